"""Blocks of many fields, each written as its authors write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from join_networks import joined
from structure import Unit, conv, structure, unit
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 12, 12)

# Concatenations -------------------------------------------------------------------------------------------------------


@joined("cv2", kind="multi-branch")
class C2f(nn.Module):
    """Of YOLOv8, without shortcuts: two halves, and what convolutions make of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = unit(8, 8, 1), unit(12, 8, 1), nn.ModuleList([unit(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@joined("fuse", kind="multi-branch")
class Aggregated(nn.Module):
    """One-shot aggregation without the input, collected in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fuse = unit(8, 4), unit(4, 4), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for layer in (self.a, self.b):
            x = layer(x)
            outs.append(x)
        return self.fuse(torch.cat(outs, 1))


@joined("", kind="dense", channels=4)
class SplitLater(nn.Module):
    """A split unit whose input is changed before it is split."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        size = math.ceil(x.shape[-1] / 4)
        x = x + F.interpolate(F.adaptive_avg_pool2d(x, size), size=x.shape[-2:])
        a, b = x.chunk(2, 1)
        return torch.cat([a, F.relu(self.narrow(b))], 1)


class DualPathBlock(nn.Module):
    """A block of a dual path network as its authors wrote it: it returns the residual and the dense path side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, 8), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        whole = torch.cat(x, 1) if isinstance(x, tuple) else x
        y = self.conv2(F.relu(self.conv1(whole)))
        residual, dense = x if isinstance(x, tuple) else (x[:, :8], x[:, 8:])
        return residual + y[:, :8], torch.cat([dense, y[:, 8:]], 1)


@structure(IMAGE, sites={"blocks.0": 12, "blocks.1": 12}, kind="dense", after="conv2")
class DualPath(nn.Module):
    """SE is on what goes into both paths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 12), nn.Sequential(DualPathBlock(12), DualPathBlock(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.blocks(F.relu(self.stem(x))), 1)


# Sums -----------------------------------------------------------------------------------------------------------------


@structure(IMAGE, sites={"unit": 8})
class Frames(nn.Module):
    """Residual units over frames that are folded into the batch; a mean over frames pools no space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = conv(3, 8), Unit()

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.stem(x)[:, None].expand(b, 2, 8, h, w).reshape(b * 2, 8, h, w)
        return self.unit(y).view(b, 2, 8, h, w).mean(1)


@joined("down")
class ScaledBeforePermuting(nn.Module):
    """The layer scale of the original ConvNeXt: before the permutation back. SE stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(8, 8, 7, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@joined("", kind="inverted", channels=16)
class Padded(nn.Module):
    """MobileNetV2 with a padding of its own before each convolution, that of the projection too."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(F.pad(x, [0, 0, 0, 0])))
        y = F.relu6(self.depthwise(F.pad(y, [1, 1, 1, 1])))
        return x + self.project(F.pad(y, [0, 0, 0, 0]))


@joined("unit")
class Shifted(nn.Module):
    """A temporal shift: parts of the map are written into another."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = unit(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :2] = x.roll(1, 0)[:, :2]
        out[:, 2:] = x[:, 2:]
        return x + self.unit(out)


class Modulated(nn.Module):
    """StyleGAN2's convolution: a kernel for each image, the batch folded into the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, 8, 8, 3, 3)), nn.Linear(4, 8)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = self.weight * self.style(style).view(b, 1, c, 1, 1)
        kernel = kernel * torch.rsqrt(kernel.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        return F.conv2d(x.reshape(1, b * c, h, w), kernel.view(b * c, c, 3, 3), padding=1, groups=b).view(b, c, h, w)


@joined("conv2")
class Styled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = Modulated(), Modulated()
        self.style = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        style = self.style.expand(x.shape[0], -1)
        out = F.leaky_relu(self.conv1(x, style), 0.2)
        return (x + self.conv2(out, style)) / math.sqrt(2)


# Gates that are no channel attention ----------------------------------------------------------------------------------


@joined("")
class Experts(nn.Module):
    """A soft mixture: the routing weighs whole branches, not channels."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.route = nn.ModuleList(conv(8, 8) for _ in range(3)), nn.Linear(8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.route(x.mean((2, 3))).softmax(1)
        out = sum(weights[:, i, None, None, None] * expert(x) for i, expert in enumerate(self.experts))
        return x + F.relu(self.norm(out))


@joined("")
class DynamicConv(nn.Module):
    """A convolution whose weight is mixed for each image (Chen et al., arXiv:1912.03458)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(3, 8, 8, 3, 3) * 0.1), nn.BatchNorm2d(8)
        self.route = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        attention = F.softmax(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)) / 30, dim=1)
        weight = torch.mm(attention, self.weight.flatten(1)).view(-1, c, 3, 3)
        out = F.conv2d(x.view(1, -1, h, w), weight, padding=1, groups=b).view(b, -1, h, w)
        return x + F.relu(self.norm(out))


# Networks -------------------------------------------------------------------------------------------------------------


@joined("conv2", torch.rand(2, 6))
class Embedded(nn.Module):
    """Of a diffusion U-Net: a timestep's embedding is added inside, the input at the end, before which SE stands."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)
        self.conv1, self.conv2, self.embed = conv(8, 8), conv(8, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(F.silu(t))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


@structure(IMAGE, sites={"features.1": 8, "features.3": 8}, kind="chain")
class Perceptual(nn.Module):
    """All activations are outputs; SE is behind those that the network goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*(layer for i in (3, 8, 8) for layer in (conv(i, 8), nn.ReLU())))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


@structure(IMAGE, sites={"convs.0": 8, "convs.2": 8}, kind="chain")
class Reader(nn.Module):
    """A recurrent network reads what convolutions have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(unit(3, 8), nn.MaxPool2d(2), unit(8, 8))
        self.lstm, self.head = nn.LSTM(8, 4, bidirectional=True, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.convs(x).mean(2).transpose(1, 2))[0])


@structure(IMAGE, sites={"unit": 8})
class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.gates = conv(3, 8), Unit(), conv(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(self.stem(x))
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([self.unit(self.stem(x)), h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h
