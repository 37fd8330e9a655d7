"""The networks that the tests of the inspection look at: real ones on the meta device, and small ones with weights."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from se_retrofit import add_se, inspect_se
from se_retrofit.inspection import Inspection


def network(name: str) -> nn.Module:
    """A real network without data: structure is all that is looked at."""
    library, _, model = name.partition("/")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(model)
        options = {"init_weights": False} if model == "googlenet" else {}
        return torchvision.models.get_model(model, weights=None, **options)


def retrofitted(name: str, reduction: int = 16) -> nn.Module:
    return copy.deepcopy(_retrofitted(name, reduction))


@cache
def _retrofitted(name: str, reduction: int) -> nn.Module:
    return add_se(network(name), reduction)


@cache
def inspected(name: str) -> Inspection:
    """What is seen in a network, or in the small one, which tests only look at."""
    return inspect_se(add_se(small_resnet(), 16, exclude="layer4.*") if name == "small" else retrofitted(name))


def small_resnet(classes: int = 10) -> nn.Module:
    """A ResNet with weights, small enough for digits."""
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=classes)


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


class UNet(nn.Module):
    """A small U-Net as people write it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.d1, self.d2 = DoubleConv(3, width), DoubleConv(width, 2 * width)
        self.bottom, self.pool = DoubleConv(2 * width, 4 * width), nn.MaxPool2d(2)
        self.up2, self.u2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), DoubleConv(4 * width, 2 * width)
        self.up1, self.u1 = nn.ConvTranspose2d(2 * width, width, 2, 2), DoubleConv(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.d1(x)
        second = self.d2(self.pool(first))
        x = self.u2(torch.cat([second, self.up2(self.bottom(self.pool(second)))], 1))
        return self.head(self.u1(torch.cat([first, self.up1(x)], 1)))


class Twice(nn.Module):
    """A residual block that is called twice, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = torchvision.models.resnet.BasicBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x)))
