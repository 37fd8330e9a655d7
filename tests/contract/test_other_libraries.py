"""Networks of other libraries, built from their configuration: nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from numeric import check_promises
from torch import nn

from se_retrofit import plan_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of while they are imported is theirs

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module) -> list[str]:
    return [site.kind for site in plan_of(model).sites]


def test_transformers_resnet() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type="bottleneck", num_labels=5
    )
    model = check_promises(transformers.ResNetForImageClassification(config), lambda net: net(IMAGE.clone()).logits)
    assert kinds(model) == ["residual"] * 4


def test_transformers_convnextv2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_labels=5)
    model = check_promises(transformers.ConvNextV2ForImageClassification(config), lambda net: net(IMAGE.clone()).logits)
    assert kinds(model) == ["residual"] * 5


def test_transformers_regnet_x() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], groups_width=8, layer_type="x", num_labels=5
    )
    model = check_promises(transformers.RegNetForImageClassification(config), lambda net: net(IMAGE.clone()).logits)
    assert kinds(model) == ["residual"] * 3


def test_transformers_regnet_y_has_channel_attention_already() -> None:
    transformers = pytest.importorskip("transformers")
    from se_retrofit import RetrofitError, add_se

    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], groups_width=8, layer_type="y"
    )
    with pytest.raises(RetrofitError, match="has channel attention already"):
        add_se(transformers.RegNetForImageClassification(config))


def test_segmentation_models_unet() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    unet = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=3)
    model = check_promises(unet, lambda net: net(IMAGE.clone()))
    assert kinds(model) == ["residual"] * 8
    assert all(site.block.startswith("encoder.") for site in plan_of(model).sites)


def test_monai_segresnet_on_volumes() -> None:
    networks = pytest.importorskip("monai.networks.nets")
    segresnet = networks.SegResNet(
        spatial_dims=3, init_filters=8, in_channels=2, out_channels=3, blocks_down=(1, 2), blocks_up=(1,)
    )
    volume = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    model = check_promises(segresnet, lambda net: net(volume.clone()))
    assert kinds(model) == ["residual"] * 4
