"""Three kinds of networks for small images: residual, inverted, and ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from torch import nn
from torchvision.models import MobileNetV2
from torchvision.models.resnet import BasicBlock


def residual(classes: int) -> nn.Module:
    """Ten of ResNet's basic blocks in three stages."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    inputs = 16
    for stage, (width, depth) in enumerate(((16, 3), (32, 4), (64, 3))):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            layers.append(BasicBlock(inputs, width, stride, shortcut))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def inverted(classes: int) -> nn.Module:
    """Ten inverted bottlenecks of MobileNetV2."""
    settings = [[1, 16, 1, 1], [4, 16, 2, 1], [4, 24, 3, 2], [4, 48, 4, 2]]
    return MobileNetV2(classes, 1.0, inverted_residual_setting=settings)


def convnext(classes: int) -> nn.Module:
    """Ten blocks of ConvNeXt in three of its stages."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 2, 2), LayerNorm2d(16)]
    inputs = 16
    for width, depth in ((16, 3), (32, 4), (64, 3)):
        stride = 1 if inputs == width else 2
        layers.append(
            ConvNeXtStage(
                inputs,
                width,
                stride=stride,
                depth=depth,
                ls_init_value=0.1,
                norm_layer=LayerNorm2d,
                norm_layer_cl=nn.LayerNorm,
            )
        )
        inputs = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(inputs), nn.Linear(inputs, classes)
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "residual": residual,
    "inverted": inverted,
    "ConvNeXt": convnext,
}
