"""Retrofitted networks that the tests in this folder send to other places."""

from __future__ import annotations

import torch
from networks import NETWORKS, randomise_se, randomised
from sweeps import swept
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from se_retrofit import add_se


def small(block: type[nn.Module] = BasicBlock) -> nn.Module:
    """A torchvision ResNet with one block a stage and gates that are not 1, which costs next to nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = randomised(ResNet(block, [1, 1, 1, 1], num_classes=5, width_per_group=64)).eval()
        return randomise_se(add_se(model, 16), std=0.1)


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


# Networks whose blocks differ in how SE is put into them: a derived forward, a Sequential, several kinds of block, channels
# last; in the sweeps one for each mode, a wrapped child, list arguments.
KINDS = swept(
    ["torchvision/resnet18", "torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x0_5", "timm/convnext_atto"],
    ["torchvision/mobilenet_v2", "torchvision/googlenet", "timm/dla34", "timm/repvgg_b0"],
)


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    return randomise_se(add_se(NETWORKS[name].build()), std=0.1), NETWORKS[name].input()
