"""Units of several branches, shortcuts with layers, and attention that stands behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from structure import IMAGE, Branch, Unit, conv, joined, structure, unit
from torch import Tensor, nn


class Two(nn.Module):
    """A stem and two blocks."""

    block: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 8), nn.Sequential(self.block(), self.block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Sides(nn.Module):
    """Two branches of two convolutions, and a layer beside them."""

    def __init__(self, channels: int = 8, outputs: int = 8) -> None:
        super().__init__()
        self.f, self.g = (nn.Sequential(unit(channels, 8), conv(8, outputs), nn.ReLU()) for _ in range(2))
        self.side = unit(8, 8, 1)


@joined("", at=("", ".se_attention_2"))
class Added(Sides):
    """Both branches are added to the input, one after the other: neither is a shortcut of the other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.f(x) + self.g(x))


@joined("", at=(".f", ".g"))
class AddedInLoop(Sides):
    def forward(self, x: Tensor) -> Tensor:
        total = x
        for branch in (self.f, self.g):
            total = total + branch(x)
        return F.relu(total)


class Dual(nn.Module):
    """Some of the new features are added to the projected input, the others put beside it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f, self.side = nn.Sequential(unit(channels, 8), conv(8, 6)), conv(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, new = self.side(x), self.f(x)
        return F.relu(torch.cat([x[:, :4] + new[:, :4], x[:, 4:], new[:, 4:]], 1))


@structure(IMAGE, sites={"1": 6, "2": 6}, after="f", kind="dense")
def DualPath() -> nn.Module:
    """Joins within a join (DPN, Chen et al., arXiv:1707.01629)."""
    return nn.Sequential(conv(3, 8), Dual(8), Dual(10), conv(10, 8))


@joined("f")
class Activated(Sides):
    """The projection of the input is activated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.side(x)


@structure(IMAGE, sites={f"blocks.{at}": 8 for at in ("0.f", "0.f.0", "0.g", "0.g.0", "1.f.0", "1.g.0")}, kind="chain")
class Alike(Two):
    """Neither branch bypasses the other."""

    class block(Sides):
        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) + self.g(x)


@joined("f")
class Halves(Sides):
    """Each half of the shortcut is made of other pixels (Shake-Shake, Gastaldi, arXiv:1705.07485)."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = (conv(F.avg_pool2d(y, 1)) for conv, y in zip(self.halves, (x, x.roll(1, -1)), strict=True))
        return self.f(x) + torch.cat([left, right], 1)

    def __init__(self) -> None:
        super().__init__()
        self.halves = nn.ModuleList(conv(8, 4, 1) for _ in range(2))


@structure(
    IMAGE, sites={"blocks.0": 8, "blocks.1": 8}, skipped={f"blocks.{i}.shortcut.0": "on the shortcut" for i in range(2)}
)
class Separable(Two):
    """The shortcut is a depthwise-separable pair (GhostNet, Han et al., arXiv:1911.11907)."""

    class block(Sides):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) + self.shortcut(x)


@structure(
    IMAGE,
    sites={f"blocks.{i}{end}": 4 for i in (1, 2) for end in ("", ".se_attention_2")},
    kind="dense",
)
class TwoWay(nn.Module):
    """Two branches make new features side by side (PeleeNet, Wang et al., arXiv:1804.06882)."""

    class Layer(Sides):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.f(x), self.g(x)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(conv(3, 8), self.Layer(8, 4), self.Layer(16, 4), conv(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@structure(IMAGE, refused="has channel attention already")
class GatedBehind(Two):
    """Channel attention behind the addition (SE-POST)."""

    class block(Sides):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(x + self.f(x))
            return x * self.side[0](x.mean((2, 3), keepdim=True)).sigmoid()


@structure(IMAGE, refused="has channel attention already")
class GatedProjection(Two):
    """Channel attention behind the projection of an inverted bottleneck (CGNet, Wu et al., arXiv:1811.08201)."""

    class block(Sides):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.core(x)
            return x * self.side[0](x.mean((2, 3), keepdim=True)).sigmoid()


@joined("body")
class PartialConvolution(Sides):
    """Some channels are convolved and written back; the rest is no query of attention (FasterNet, Chen et al., arXiv:2303.03667)."""

    def __init__(self) -> None:
        super().__init__()
        self.partial, self.body = conv(2, 2), nn.Sequential(unit(8, 8, 1), conv(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :2] = self.partial(x[:, :2])
        return x + self.body(y)


@structure(IMAGE, sites={"blocks.0": 8}, kind="inverted")
class Blurred(Two):
    """A fixed filter stands between the depthwise convolution and the projection, as a pool (Zhang, arXiv:1904.11486)."""

    class block(Sides):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.project = nn.Sequential(conv(8, 8, groups=8), nn.ReLU()), conv(8, 8, 1)
            self.register_buffer("filter", torch.ones(8, 1, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(F.conv2d(self.core(self.side(x)), self.filter, padding=1, groups=8))


@structure(IMAGE, sites={"unit": 8})
class TwoLevels(nn.Module):
    """Where two levels of a pyramid meet is no unit, though one of them is a part of what is made of both (BiFPN, Tan et al.,
    arXiv:1911.09070)."""

    class Level(Sides):
        def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            fine = self.f(fine + F.interpolate(coarse, scale_factor=2))
            return fine, self.g(coarse + F.max_pool2d(fine, 2))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.level, self.head = conv(3, 8), Unit(), self.Level(), conv(8, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.unit(self.stem(x))
        return [self.head(level) for level in self.level(x, F.max_pool2d(x, 2))]


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


@joined("fuse", kind="multi-branch")
class PassedOn(Sides):
    """Returns its input as well, which the next blocks take beside their own (SelecSLS, Mehta et al., arXiv:1907.00837)."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = conv(24, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fuse(torch.cat([self.f(x), self.g(x), x], 1)), x


def halved() -> dict[str, nn.Module]:
    return {"conv1": conv(4, 4), "conv2": conv(4, 4), "norm": nn.BatchNorm2d(4)}


@joined(parts=halved, kind="dense", channels=4)
def NormBeforeConcat(self, x):
    """SE behind the norm would pass it dense gradients instead of slices, which it sums up in another order."""
    x, y = x.chunk(2, 1)
    return torch.cat([x, self.norm(self.conv2(self.conv1(y).relu()))], 1)


@joined(parts=halved, channels=4)
def AddBeforeConcat(self, x):
    x, y = x.chunk(2, 1)
    return torch.cat([x + self.norm(self.conv2(self.conv1(x).relu())), y], 1)


@joined(
    parts=lambda: {"layers": nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, 4)) for c in (8, 12))},
    example=IMAGE, kind="dense", after="2", channels=4, at=(".layers.0", ".layers.1"),
)  # fmt: skip
def GrownInLoop(self, x):
    """A dense block whose input grows (FC-DenseNet, Jégou et al., arXiv:1611.09326); it returns as many channels as it got."""
    for layer in self.layers:
        x = torch.cat([x, layer(x)], 1)
    return x[:, 8:]


class Progressive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = unit(12, 4, 1), unit(4, 4), unit(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        return torch.cat([x, y, self.third(y)], 1)


@structure(IMAGE, sites={"1": 12, "2": 12}, kind="multi-branch", after="cat")
def OneAfterTheOther() -> nn.Module:
    """All branches are joined, and each starts from the one before (STDC, Fan et al., arXiv:2104.13188)."""
    return nn.Sequential(conv(3, 12), Progressive(), Progressive())


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = conv(8, 2), nn.Sequential(unit(10, 8), conv(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        flow = self.coarse(x)
        flow = flow + self.fine(torch.cat([x, flow], 1))
        return F.grid_sample(x, flow.movedim(1, -1), align_corners=False)


@structure(IMAGE, sites={"2": 8, "3": 8}, skipped={"1.coarse": "sampled by", "1.fine.1": "sampled by"})
def RefinedFlow() -> nn.Module:
    """A flow that is refined tells where features are sampled (SpyNet, Ranjan and Black, arXiv:1611.00850)."""
    return nn.Sequential(conv(3, 8), Flow(), Unit(), Unit())
