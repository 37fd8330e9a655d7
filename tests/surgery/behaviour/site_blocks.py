"""Networks in which it takes thought to tell where SE goes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Of a diffusion U-Net: a timestep's embedding is added inside, the input at the end."""

    def __init__(self, channels: int = 8, embedding: int = 6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.embed = nn.Linear(embedding, channels)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(F.silu(t))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, 6), nn.SiLU(), nn.Linear(6, 6))
        self.down, self.middle = ResBlock(), ResBlock()
        self.up = nn.ModuleList([ResBlock(), ResBlock()])
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        t = self.time(t[:, None])
        x = self.down(self.stem(x), t)
        skip = x
        x = F.avg_pool2d(x, 2)
        x = self.middle(x, t)
        x = F.interpolate(x, size=skip.shape[-2:])
        for block in self.up:
            x = block(x, t)
        return self.out(x)


class WaveNetBlock(nn.Module):
    """A gated unit, whose residual and skip output come from one value."""

    def __init__(self, channels: int = 8, dilation: int = 1) -> None:
        super().__init__()
        self.filter = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.mix = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        y = torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))
        y = self.mix(y)
        return x + y, y


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 1)
        self.blocks = nn.ModuleList([WaveNetBlock(dilation=d) for d in (1, 2, 4)])
        self.head = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        x, total = self.stem(x), 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.head(F.relu(total))


class TasNetBlock(nn.Module):
    """Of Conv-TasNet: a depthwise-separable unit with a residual and a skip output."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(channels, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden),
            nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden), nn.PReLU(), nn.GroupNorm(1, hidden),
        )  # fmt: skip
        self.residual, self.skip = nn.Conv1d(hidden, channels, 1), nn.Conv1d(hidden, channels, 1)

    def forward(self, x):
        y = self.body(x)
        return x + self.residual(y), self.skip(y)


class TasNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 8, 4)
        self.blocks = nn.ModuleList([TasNetBlock() for _ in range(2)])

    def forward(self, x):
        x, total = self.stem(x), 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return total


class Experts(nn.Module):
    """A soft mixture: the routing weighs whole branches, not channels."""

    def __init__(self, channels: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(experts)])
        self.route = nn.Linear(channels, experts)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        weights = self.route(x.mean((2, 3))).softmax(1)
        out = sum(weights[:, i, None, None, None] * expert(x) for i, expert in enumerate(self.experts))
        return x + F.relu(self.norm(out))


class CondConv(nn.Module):
    """A convolution whose weight is mixed for each image."""

    def __init__(self, channels: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, channels, channels, 3, 3) * 0.1)
        self.route = nn.Linear(channels, experts)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        b, c, h, w = x.shape
        routing = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = (routing @ self.weight.flatten(1)).view(b * c, c, 3, 3)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b).view(b, c, h, w)
        return x + F.relu(self.norm(out))


class DynamicConv(CondConv):
    """The same with a softmax over the kernels, behind a small network (dynamic convolution)."""

    def __init__(self, channels: int = 8, experts: int = 3) -> None:
        super().__init__(channels, experts)
        self.route = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, experts))

    def forward(self, x):
        b, c, h, w = x.shape
        attention = F.softmax(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)) / 30, dim=1)
        weight = torch.mm(attention, self.weight.view(attention.shape[1], -1)).view(-1, c, 3, 3)
        out = F.conv2d(x.view(1, -1, h, w), weight, padding=1, groups=b).view(b, -1, h, w)
        return x + F.relu(self.norm(out))


class PreActivated(nn.Module):
    """An in-place ReLU comes first in the branch, and so changes what the skip sees."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        out = self.conv1(self.relu(x))
        out = self.conv2(F.relu(self.bn1(out)))
        out += x
        return out


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, dtype=torch.complex64)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x + self.conv2(x)


class DualPathBlock(nn.Module):
    """A block of a dual path network as its authors wrote it: it returns the residual and the dense path side by side."""

    def __init__(self, inputs: int, residual: int = 8, new: int = 4) -> None:
        super().__init__()
        self.residual = residual
        self.conv1, self.conv2 = nn.Conv2d(inputs, 8, 3, padding=1), nn.Conv2d(8, residual + new, 1)

    def forward(self, x):
        whole = torch.cat(x, 1) if isinstance(x, tuple) else x
        y = self.conv2(F.relu(self.conv1(whole)))
        old_residual, old_dense = x if isinstance(x, tuple) else (x[:, : self.residual], x[:, self.residual :])
        return old_residual + y[:, : self.residual], torch.cat([old_dense, y[:, self.residual :]], 1)


class DualPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(DualPathBlock(12), DualPathBlock(16))

    def forward(self, x):
        return torch.cat(self.blocks(F.relu(self.stem(x))), 1)
