"""Networks of other libraries, built from their configuration: nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from numeric import check_promises
from sweeps import swept
from torch import nn

from se_retrofit import RetrofitError, add_se, plan_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of while they are imported is theirs


def transformers(name: str, **config: Any) -> nn.Module:
    library = pytest.importorskip("transformers")
    return getattr(library, f"{name}ForImageClassification")(getattr(library, f"{name}Config")(**config))


def regnet(layer: str) -> nn.Module:
    widths = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8}
    return transformers("RegNet", **widths, layer_type=layer, num_labels=5)


def resnet() -> nn.Module:
    return transformers("ResNet", embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type="bottleneck")


def convnext() -> nn.Module:
    return transformers("ConvNextV2", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])


def unet() -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    return library.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8), classes=3)


def segresnet() -> nn.Module:
    options = {"spatial_dims": 3, "init_filters": 8, "in_channels": 2, "out_channels": 3}
    return pytest.importorskip("monai.networks.nets").SegResNet(**options, blocks_down=(1, 2), blocks_up=(1,))


IMAGES, VOLUMES = (2, 3, 64, 64), (1, 2, 16, 16, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "transformers' ResNet": (resnet, IMAGES, 4),
    "transformers' ConvNeXtV2": (convnext, IMAGES, 5),
    "transformers' RegNetX": (partial(regnet, "x"), IMAGES, 3),
    "segmentation models' U-Net": (unet, IMAGES, 8),
    "MONAI's SegResNet, on volumes": (segresnet, VOLUMES, 4),
}


@pytest.mark.parametrize("name", swept(["transformers' ResNet"], [*NETWORKS][1:]))
def test_residual_units_of_other_libraries_get_se(name: str) -> None:
    build, shape, units = NETWORKS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def run(net: nn.Module) -> Any:
        output = net(x.clone())
        return getattr(output, "logits", output)

    model = check_promises(build(), run)
    assert [site.kind for site in plan_of(model).sites] == ["residual"] * units


@pytest.mark.sweep
def test_transformers_regnet_y_has_channel_attention_already() -> None:
    with pytest.raises(RetrofitError, match="has channel attention already"):
        add_se(regnet("y"))
