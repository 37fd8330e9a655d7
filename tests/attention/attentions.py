"""Attentions by name, as a user gives them, and the networks that they go into."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from networks import NETWORKS, randomise_se
from timm.layers import EcaModule, GatherExcite, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

from se_retrofit import add_se
from se_retrofit.attention import Inserted, Slot


class Gain(nn.Module):
    """A module of a user's own, which takes any number of spatial dims and is far from an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight.view(-1, *[1] * (x.dim() - 2)) + 1


def by_factory(slot: Slot) -> nn.Module:
    return nn.Sequential(Gain(slot.channels), nn.Identity())


BUILT_IN: dict[str, Any] = {name: name for name in ("se", "eca", "cbam", "static")}
FACTORIES: dict[str, Any] = {"class": Gain, "factory": by_factory, "partial": partial(Gain)}
TIMM: dict[str, Any] = {  # for two spatial dims
    "EcaModule": EcaModule,
    "CbamModule": CbamModule,
    "SEModule": SEModule,
    # with use_mlp=True or extra_params=True, timm 1.0.31 itself can't build it: it hands a dict's keys on as arguments
    "GatherExcite": partial(GatherExcite, use_mlp=False, extent=2),
    "CoordAttn": CoordAttn,
}

ALL = BUILT_IN | FACTORIES | TIMM
# those that the default run takes; the sweeps take the others, too
EVERY_TIME = [*BUILT_IN, "class", "SEModule"]
IN_SWEEPS = [name for name in ALL if name not in EVERY_TIME]

# Networks with SE whose blocks differ in how it is put into them: a derived forward, a Sequential, channels last; in the sweeps
# one for several kinds of block, each mode, a wrapped child, list arguments
LIBRARIES = ["timm/test_resnet", "torchvision/squeezenet1_1", "timm/test_convnext"]
MORE_OF_LIBRARIES = [
    "torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v2", "torchvision/googlenet", "timm/dla34", "timm/repvgg_b0",
    "torchvision/densenet121", "timm/hrnet_w18_small",
]  # fmt: skip


class Unit(nn.Module):
    """A residual unit with 1, 2 or 3 spatial dims, on values with their channels second or last."""

    def __init__(self, dims: int, last: bool) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.conv, self.norm, self.drop = conv(8, 8, 3, padding=1), norm(8), nn.Dropout(0.2)
        self.mix = nn.Linear(8, 8) if last else None
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is None:
            return x + self.drop(self.norm(self.conv(x)))
        return x + self.mix(self.drop(self.norm(self.conv(x.movedim(-1, 1)))).movedim(1, -1))


class Network(nn.Module):
    def __init__(self, dims: int = 2, last: bool = False) -> None:
        super().__init__()
        self.stem = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 8, 3)
        self.first, self.second = Unit(dims, last), Unit(dims, last)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.second(self.first(x.movedim(1, -1) if self.last else x)))
        return (x.movedim(-1, 1) if self.last else x).flatten(2).mean(-1)


def inputs(dims: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *(9, 8, 7)[:dims], generator=torch.Generator().manual_seed(0)).to(dtype)


def retrofitted(network: nn.Module, attention: Any, x: Tensor | None) -> nn.Module:
    return add_se(network, attention=attention, example_inputs=x)


def inserted(model: nn.Module) -> dict[str, Inserted]:
    return {path: m for path, m in model.named_modules() if isinstance(m, Inserted) and m.site is not None}


def original(name: str, dims: int = 2, last: bool = False) -> tuple[nn.Module, Tensor]:
    """A library's network that gets SE, or the small one that gets an attention; and an input."""
    if name in NETWORKS:
        return NETWORKS[name].build(), NETWORKS[name].input()
    return Network(dims, last).eval(), inputs(dims)


def citizen(name: str, dims: int = 2, last: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, the same retrofitted, and an input."""
    network, x = original(name, dims, last)
    return network, retrofitted(network, ALL.get(name, "se"), None if name in NETWORKS else x), x


def learned(name: str, dims: int = 2) -> tuple[nn.Module, Tensor]:
    """A retrofitted network whose gates are not 1, and an input."""
    _, model, x = citizen(name, dims)
    return randomise_se(model, std=0.1 if name in NETWORKS else 0.3), x
