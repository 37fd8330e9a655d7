"""The ways in which a branch joins what bypassed it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from structure import Branch, Two, Unit, conv, joined, module_of, structure, unit
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

IMAGE = torch.randn(2, 3, 10, 10)
WAVE = torch.randn(2, 8, 40)


@joined()
def Permuted(self, x: Tensor) -> Tensor:
    """A convolution without an activation beside the input, both moved to another layout."""
    return (x.permute(0, 2, 3, 1) + self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Joins in a helper ----------------------------------------------------------------------------------------------------


@module_of(dict)
def Add(self, x: Tensor, y: Tensor) -> Tensor:
    return x + y


@module_of(dict)
def MPAdd(self, x: Tensor, y: Tensor) -> Tensor:
    """Keeps the magnitude (Karras et al., arXiv:2312.02696)."""
    return x.lerp(y, 0.3) / (0.7**2 + 0.3**2) ** 0.5


@module_of(lambda: {"scale": nn.Parameter(torch.rand(8, 1, 1) + 0.5)})
def ScaledAdd(self, x: Tensor, y: Tensor) -> Tensor:
    return x + self.scale * y


def called(self: Any, x: Tensor) -> Tensor:
    return self.add(x, self.branch(x))


def of_float_functional(self: Any, x: Tensor) -> Tensor:
    return self.add.add(x, self.branch(x))


for helper in (Add, MPAdd, ScaledAdd, FloatFunctional):
    block = module_of(lambda helper=helper: {"add": helper()}, Branch)
    joined(name=f"With{helper.__name__}")(block(of_float_functional if helper is FloatFunctional else called))


# Joins that are no plain add ------------------------------------------------------------------------------------------


@joined()
def LerpByChannel(self, x: Tensor) -> Tensor:
    """Taken apart on meta: x + t * (y - x)."""
    return torch.lerp(x, self.branch(x), self.scale)


@joined()
def AddCMul(self, x: Tensor) -> Tensor:
    """ViT's and ConvNeXt's layer scale in one call."""
    return torch.addcmul(x, self.scale, self.branch(x))


@joined()
def Where(self, x: Tensor) -> Tensor:
    """Stochastic depth for each image."""
    keep = torch.ones(len(x), 1, 1, 1, dtype=torch.bool)
    return torch.where(keep, x + self.branch(x), x)


@joined()
def MaskedFill(self, x: Tensor) -> Tensor:
    return x + self.branch(x).masked_fill(x.new_ones(x.shape[-1]) < 0, 0)


@joined("conv1")
def SumOfOne(self, x: Tensor) -> Tensor:
    """A convolution beside its input: a residual unit, no sum to be fused."""
    return F.relu(sum([x, self.conv1(x)]))


@joined()
def Stacked(self, x: Tensor) -> Tensor:
    return torch.stack([x, self.branch(x)]).sum(0)


@joined("body", parts=lambda: {"body": nn.Sequential(nn.ReLU(inplace=True), conv(8, 8), nn.BatchNorm2d(8))})
def ReLUFirst(self, x: Tensor) -> Tensor:
    """The branch's first activation overwrites the input, and so the skip."""
    return torch.add(x, self.body(x))


# Streams ------------------------------------------------------------------------------------------------------------


@structure(
    WAVE,
    parts=lambda: {"layers": nn.ModuleList(nn.Sequential(*unit(8, 8, dims=1), conv(8, 8, dims=1)) for _ in range(3))},
    sites={f"layers.{i}": 8 for i in range(3)},
)
def Summed(self, x: Tensor) -> Tensor:
    """A stream whose stages are summed up as well."""
    total = 0
    for layer in self.layers:
        x = x + layer(x)
        total = total + x
    return total


@module_of(lambda: {"conv": conv(8, 8, dims=1), "unit": Unit(dims=1)})
def Injected(self, x: Tensor, other: Tensor | None = None) -> Tensor:
    """A layer of one stream, to whose convolution another stream's is added."""
    x = self.conv(x)
    return self.unit(x if other is None else x + other)


@structure(
    WAVE,
    parts=lambda: {name: nn.Sequential(Injected(), Injected()) for name in ("times", "spectra")},
    sites={f"{s}.{i}.unit": 8 for s in ("times", "spectra") for i in range(2)},
)
def HDemucs(self, x: Tensor) -> Tensor:
    """Two streams become one (Défossez, arXiv:2111.03600)."""
    y = self.times(x)
    return self.spectra[1](self.spectra[0](x.flip(2)), y)


# Couplings ------------------------------------------------------------------------------------------------------------


@module_of(lambda: {name: nn.Sequential(*unit(4, 4), conv(4, 4)) for name in "fg"})
def Reversible(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gomez et al., arXiv:1707.04585."""
    x1, x2 = x
    y1 = x1 + self.f(x2)
    return y1, x2 + self.g(y1)


@structure(IMAGE, sites={f"blocks.{i}{end}": 4 for i in range(2) for end in ("", ".se_attention_2")})
class RevNet(Two):
    block = Reversible

    def forward(self, x: Tensor) -> Tensor:
        pair = self.stem(x).chunk(2, 1)
        for block in self.blocks:
            pair = block(pair)
        return torch.cat(pair, 1)


# Two outputs ----------------------------------------------------------------------------------------------------------


@module_of(dict, Branch)
def Carrying(self, given: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Hands on its output with all that came before it."""
    x, seen = given
    x = F.relu(x + self.branch(x))
    return x, [*seen, x]


@structure(
    IMAGE,
    parts=lambda: {"stem": conv(3, 8), "blocks": nn.Sequential(Carrying(), Carrying(), Carrying())},
    sites={"blocks.0": 8, "blocks.1": 8, "blocks.2": 8},
)
def Stack(self, x: Tensor) -> Tensor:
    """A sequence of blocks that hand on a list."""
    x, seen = self.blocks((self.stem(x), []))
    return torch.cat([x, *seen], 1)
