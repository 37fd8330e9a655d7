"""The ways in which a branch joins what bypassed it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from structure import Unit, conv, structure
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 10, 10)


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
    """A stem and two blocks."""

    block: type[nn.Module] = Branch

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 8), nn.ModuleList(self.block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def joined(sites: str | None = "", refused: str = ""):  # type: ignore[no-untyped-def]
    """A network of two such blocks."""

    def noted(cls: type[nn.Module]) -> type[nn.Module]:
        network = type(cls.__name__, (Two,), {"block": cls})
        expected = {} if sites is None else {f"blocks.{i}{sites}": 8 for i in range(2)}
        structure(IMAGE, sites=expected, refused=refused)(network)
        return cls

    return noted


# Joins in a helper ----------------------------------------------------------------------------------------------------


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class AddAct(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x + y)


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


for helper in (Add, AddAct, MPAdd, DropAdd, ScaledAdd, torch.ao.nn.quantized.FloatFunctional):
    name = f"With{helper.__name__}"
    block = type(name, (WithHelper,), {"helper": helper})
    if helper is torch.ao.nn.quantized.FloatFunctional:
        block.forward = lambda self, x: self.add.add(x, self.branch(x))  # type: ignore[method-assign]
    joined()(block)


# Joins that are no plain add ------------------------------------------------------------------------------------------


@joined()
class Lerp(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.branch(x), 0.3)


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
class WhereMasked(Branch):
    def forward(self, x: Tensor) -> Tensor:
        seen = x.new_ones(x.shape[-1]) > 0
        return x + torch.where(seen, self.branch(x), torch.zeros_like(x))


@joined()
class MaskedFill(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x).masked_fill(x.new_ones(x.shape[-1]) < 0, 0)


@joined()
class SumOfList(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.branch(x)])


@joined()
class SumOfOne(Branch):
    """A convolution beside its input: a residual unit, no sum to be fused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum([x, self.conv1(x)]))


@joined()
class Stacked(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.branch(x)]).sum(0)


@joined()
class ReLUFirst(nn.Module):
    """The branch's first activation overwrites the input, and so the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), conv(8, 8), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x))


# Couplings ------------------------------------------------------------------------------------------------------------


class Half(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4))


class Reversible(nn.Module):
    """Gomez et al., arXiv:1707.04585."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = Half(), Half()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], 1)


structure(IMAGE, sites={f"blocks.{i}{end}": 4 for i in range(2) for end in ("", ".se_attention_2")})(
    type("RevNet", (Two,), {"block": Reversible})
)


class ReversiblePair(Reversible):
    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x1, x2 = x
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


@structure(IMAGE, sites={f"blocks.{i}{end}": 4 for i in range(2) for end in ("", ".se_attention_2")})
class RevNetPairs(Two):
    block = ReversiblePair

    def forward(self, x: Tensor) -> Tensor:
        pair = self.stem(x).chunk(2, 1)
        for block in self.blocks:
            pair = block(pair)
        return torch.cat(pair, 1)


# Two outputs ----------------------------------------------------------------------------------------------------------


class Tapped(Branch):
    """Returns its output and what its branch has made."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.conv1(self.norm1(x)))
        z = self.conv2(y)
        return x + z, y


@structure(IMAGE, sites={"blocks.0": 8, "blocks.1": 8})
class TwoOutputs(Two):
    block = Tapped

    def forward(self, x: Tensor) -> Tensor:
        x, taps = self.stem(x), []
        for block in self.blocks:
            x, tap = block(x)
            taps.append(tap)
        return x + sum(taps)


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


# Complex convolutions -------------------------------------------------------------------------------------------------


class ComplexConv(nn.Module):
    """The real and the imaginary part, side by side in the channels (DCCRN, arXiv:2008.00264)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.real, self.imag = (conv(channels // 2, channels // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([self.real(a) - self.imag(b), self.real(b) + self.imag(a)], 1)


@joined()
class ComplexUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ComplexConv(), ComplexConv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


@structure(IMAGE, refused="complex")
class ComplexNumbers(nn.Module):
    """SE is for real values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.complex(self.stem(x), self.stem(x))
        return torch.view_as_real(x + torch.tanh(self.unit(x)))


@structure(IMAGE, sites={"units.0": 8, "units.1": 8})
class Plain(nn.Module):
    """For comparison: units as they are in every ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = conv(3, 8), nn.Sequential(Unit(), Unit())

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x))
