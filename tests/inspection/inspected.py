"""The networks that the tests of the inspection look at, small ones of each kind of block, and what was seen in them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.googlenet import Inception
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.vgg import make_layers

from se_retrofit import add_se, inspect_se
from se_retrofit.inspection import Inspection


class PlainNet(nn.Module):
    """A chain of convolutions whose activations and pools are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class DoubleConv(nn.Module):
    """The unit of which U-Nets are made."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Decoder(nn.Module):
    """The other half of a U-Net, which takes what the stages gave."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up2, self.u2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), DoubleConv(4 * width, 2 * width)
        self.up1, self.u1 = nn.ConvTranspose2d(2 * width, width, 2, 2), DoubleConv(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        x = self.u2(torch.cat([second, self.up2(x)], 1))
        return self.head(self.u1(torch.cat([first, self.up1(x)], 1)))


class UNet(nn.Module):
    """A small U-Net as people write it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.d1, self.d2 = DoubleConv(3, width), DoubleConv(width, 2 * width)
        self.bottom, self.pool = DoubleConv(2 * width, 4 * width), nn.MaxPool2d(2)
        self.decoder = Decoder(width)

    def forward(self, x: Tensor) -> Tensor:
        first = self.d1(x)
        second = self.d2(self.pool(first))
        return self.decoder(first, second, self.bottom(self.pool(second)))


class Siamese(nn.Module):
    """The changes between two images, at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (BasicBlock(n, 8, 2, nn.Conv2d(n, 8, 1, 2)) for n in (3, 8))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.second(first)

    def forward(self, before: Tensor, after: Tensor) -> list[Tensor]:
        return [b - a for a, b in zip(self.stages(before), self.stages(after), strict=True)]


class Twice(nn.Module):
    """A residual block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), BasicBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x)))


def small_resnet() -> nn.Module:
    """A ResNet, small enough for digits."""
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 2, 1, 1], num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": small_resnet,
    "bottleneck": partial(ResNet, Bottleneck, [2, 1, 1, 1], num_classes=10, width_per_group=16),
    "inverted": partial(MobileNetV2, 10, inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]]),
    "dense": partial(DenseNet, 8, (4, 2), 16, num_classes=10),
    "branches": lambda: nn.Sequential(*(Inception(inputs, 8, 8, 8, 8, 8, 8) for inputs in (3, 32))),
    "scaled": partial(ConvNeXt, [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10),
    "split": partial(ShuffleNetV2, [2, 1, 1], [8, 16, 32, 64, 64], num_classes=10),
    "chain": lambda: nn.Sequential(OrderedDict(features=make_layers([8, "M", 16, "M"], batch_norm=True))),
    "functions": PlainNet,
    "unet": UNet,
    "twice": Twice,
    "traced": lambda: torch.fx.symbolic_trace(small_resnet()),
}


@cache
def example(size: int = 64) -> Tensor:
    return torch.empty(2, 3, size, size)


@cache
def inspected(name: str) -> Inspection:
    """What is seen in a network, which tests only look at; of the ``"residual"`` one, the last stage has no SE."""
    model = NETWORKS[name]()
    options = {"exclude": "layer4.*"} if name == "residual" else {}
    return inspect_se(add_se(model, 16, example_inputs=example(), inplace=name != "traced", **options), example())


class Box(NamedTuple):
    """A box or a join in a picture: what it says when pointed at, its class, its left and upper side or its middle, and its text."""

    tip: str
    role: str
    x: float
    y: float
    text: list[str]


def boxes(svg: ET.Element) -> Iterator[Box]:
    """Those of a picture."""
    for group in svg.iter("g"):
        shape = next(s for s in group if s.tag in ("rect", "circle"))
        x, y = (float(shape.get(key) or shape.get("c" + key) or 0) for key in "xy")
        text = [text.text or "" for text in group.iter("text")]
        yield Box(group.findtext("title") or "", group.get("class") or "", x, y, text)
