"""The ways in which a branch joins what bypassed it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from structure import Unit, conv, structure, unit
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 10, 10)
WAVE = torch.randn(2, 8, 40)


class Branch(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm1, self.conv1, self.conv2 = (
            nn.BatchNorm2d(channels),
            conv(channels, channels),
            conv(channels, channels),
        )

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(self.norm1(x))))


class Two(nn.Module):
    """A stem and two blocks, which are given what else the network is given."""

    block: type[nn.Module] = Branch
    example: Tensor = IMAGE

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(self.example.shape[1], 8, dims=self.example.dim() - 2)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *others)
        return x


def joined(
    after: str = "conv2",
    *others: Tensor,
    example: Tensor = IMAGE,
    kind: str = "residual",
    channels: int = 8,
    at: tuple[str, ...] = ("",),
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A network of two such blocks, with SE behind one of their layers, and at one of their modules or more."""

    def noted(cls: type[nn.Module]) -> type[nn.Module]:
        network = type(cls.__name__, (Two,), {"block": cls, "example": example})
        sites = {f"blocks.{i}{end}": channels for i in range(2) for end in at}
        structure(example, *others, sites=sites, kind=kind, after=after)(network)
        return cls

    return noted


@joined()
class Permuted(Branch):
    """A convolution without an activation beside the input, both moved to another layout."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) + self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Joins in a helper ----------------------------------------------------------------------------------------------------


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class MPAdd(nn.Module):
    """Keeps the magnitude (Karras et al., arXiv:2312.02696)."""

    def __init__(self, t: float = 0.3) -> None:
        super().__init__()
        self.t = t

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.lerp(b, self.t) / ((1 - self.t) ** 2 + self.t**2) ** 0.5


class DropAdd(nn.Module):
    """Drops whole branches where it adds them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = y / 0.9 * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.9))
        return x + y


class ScaledAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.scale * y


class WithHelper(Branch):
    helper: type[nn.Module] = Add

    def __init__(self) -> None:
        super().__init__()
        self.add = self.helper()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.branch(x))


for helper in (Add, MPAdd, DropAdd, ScaledAdd, torch.ao.nn.quantized.FloatFunctional):
    name = f"With{helper.__name__}"
    block = type(name, (WithHelper,), {"helper": helper})
    if helper is torch.ao.nn.quantized.FloatFunctional:
        block.forward = lambda self, x: self.add.add(x, self.branch(x))  # type: ignore[method-assign]
    joined()(block)


# Joins that are no plain add ------------------------------------------------------------------------------------------


@joined()
class LerpByChannel(Branch):
    """Taken apart on meta: x + t * (y - x)."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.branch(x), self.t)


@joined()
class AddCMul(Branch):
    """ViT's and ConvNeXt's layer scale in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.gamma, self.branch(x))


@joined()
class Where(Branch):
    """Stochastic depth for each image."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(len(x), 1, 1, 1, dtype=torch.bool)
        return torch.where(keep, x + self.branch(x), x)


@joined()
class MaskedFill(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x).masked_fill(x.new_ones(x.shape[-1]) < 0, 0)


@joined()
class SumOfList(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.branch(x)])


@joined("conv1")
class SumOfOne(Branch):
    """A convolution beside its input: a residual unit, no sum to be fused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum([x, self.conv1(x)]))


@joined()
class Stacked(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.branch(x)]).sum(0)


@joined("body")
class ReLUFirst(nn.Module):
    """The branch's first activation overwrites the input, and so the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), conv(8, 8), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x))


# Streams ------------------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(conv(8, 8, dims=1), nn.ReLU(), conv(8, 8, dims=1)) for _ in range(3))


@structure(WAVE, sites={f"layers.{i}": 8 for i in range(3)})
class Summed(Stream):
    """A stream whose stages are summed up as well."""

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for layer in self.layers:
            x = x + layer(x)
            total = total + x
        return total


@structure(WAVE, sites={f"layers.{i}": 8 for i in range(3)})
class Yielded(Stream):
    """A stream whose stages are all returned."""

    def forward(self, x: Tensor) -> list[Tensor]:
        stages = []
        for layer in self.layers:
            x = layer(x) + x
            stages.append(x)
        return stages


class Injected(nn.Module):
    """A layer of one stream, to whose convolution another stream's is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unit = conv(8, 8, dims=1), Unit(dims=1)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        return self.unit(x if other is None else x + other)


@structure(WAVE, sites={f"{s}.{i}.unit": 8 for s in ("times", "spectra") for i in range(2)})
class HDemucs(nn.Module):
    """Two streams become one (Défossez, arXiv:2111.03600)."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.spectra = (nn.ModuleList([Injected(), Injected()]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.times[1](self.times[0](x))
        return self.spectra[1](self.spectra[0](x.flip(2)), y)


class Averaged(Branch):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return 0.5 * (self.branch(x) + skip)


@structure(IMAGE, sites={"units.0": 8, "units.1": 8})
class DexiNed(nn.Module):
    """Units that are given their skip, a sum of projections (Poma et al., arXiv:1909.01955)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = unit(3, 8), nn.ModuleList([Averaged(), Averaged()])
        self.first, self.second = conv(8, 8, 1), conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.units[0](x, self.first(x))
        return self.units[1](y, self.first(x) + self.second(y))


# Couplings ------------------------------------------------------------------------------------------------------------


class Half(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4))


class Reversible(nn.Module):
    """Gomez et al., arXiv:1707.04585."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Half(), Half()

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
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


class Carrying(Branch):
    """Hands on its output with all that came before it."""

    def forward(self, given: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        x, seen = given
        x = F.relu(x + self.branch(x))
        return x, [*seen, x]


@structure(IMAGE, sites={"blocks.0": 8, "blocks.1": 8, "blocks.2": 8})
class Stack(nn.Module):
    """A sequence of blocks that hand on a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 8), nn.Sequential(Carrying(), Carrying(), Carrying())

    def forward(self, x: Tensor) -> Tensor:
        x, seen = self.blocks((self.stem(x), []))
        return torch.cat([x, *seen], 1)


class Pooling(Branch):
    """Returns beside its output what it has made of its input for the shortcut (DLA, Yu et al., arXiv:1707.06484)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.max_pool2d(x, 3, 1, 1)
        return F.relu(self.norm1(pooled) + self.conv2(F.relu(self.conv1(x)))), pooled


@structure(IMAGE, sites={"first": 8, "second": 8}, after="conv2")
class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.root = conv(3, 8), Pooling(), Pooling(), conv(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, pooled = self.first(self.stem(x))
        z, _ = self.second(y)
        return self.root(torch.cat([pooled, y, z], 1))
