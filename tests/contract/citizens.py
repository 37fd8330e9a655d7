"""Retrofitted networks that the tests in this folder send to other places."""

from __future__ import annotations

import torch
from networks import NETWORKS, narrow_resnet, randomise_se
from sweeps import swept
from torch import Tensor, nn

from se_retrofit import add_se


def small() -> nn.Module:
    """A narrow ResNet with gates that are not 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return randomise_se(add_se(narrow_resnet(), 4), std=0.1)


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


# Networks whose blocks differ in how SE is put into them: a derived forward, a Sequential, channels last; in the sweeps one
# for several kinds of block, each mode, a wrapped child, list arguments.
KINDS = swept(
    ["timm/test_resnet", "torchvision/squeezenet1_1", "timm/test_convnext"],
    ["torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v2", "torchvision/googlenet", "timm/dla34", "timm/repvgg_b0"],
)  # fmt: skip


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    return randomise_se(add_se(NETWORKS[name].build()), std=0.1), NETWORKS[name].input()
