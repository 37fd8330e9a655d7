"""Blocks with the Python that people write in a forward."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """What the blocks have in common; each has a forward of its own."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.2)
        self.feats: list[Any] = []
        self.calls = 0
        self.cfg = {"alpha": 0.5}
        self.state = SimpleNamespace(alpha=0.75)

    def branch(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class Random(Block):
    """Draws from all three generators."""

    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        out = self.bn2(self.conv2(self.branch(x)))
        if self.training:
            out = out * float(np.random.beta(0.5, 0.5)) * torch.rand(x.shape[0], 1, 1, 1)
        return x + out / np.sqrt(2)


class FillsDict(Block):
    def forward(self, x, store=None):
        out = self.bn2(self.conv2(self.branch(x)))
        if store is not None:
            store["out"] = out
        return x + out


class LooksUp(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.drop(self.branch(x))))
        out = out * self.cfg["alpha"] * self.state.alpha
        return x + out


class FunctionalNorm(Block):
    def train(self, mode: bool = True):
        super().train(mode)
        self.bn2.eval()
        return self

    def forward(self, x):
        bn = self.bn2
        out = F.batch_norm(
            self.conv2(self.branch(x)), bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum
        )
        return x + out


class Branches(Block):
    def forward(self, x):
        out = self.branch(x)
        if x.shape[-1] > 12:
            out = out * 2
        if x.dtype == torch.float64 or x.device.type != "cpu":
            out = out + 1
        if x.requires_grad and torch.is_grad_enabled():
            out = out * 0.5
        if x.shape[-1] in {9, 11}:
            out = out - 0.5
        if type(x) is torch.Tensor:
            out = out * {16: 2.0}.get(x.shape[-1], 1.5)
        out = self.bn2(self.conv2(out))
        return x + out


class Arguments(Block):
    def forward(self, x, scale=None, repeats=1, factors=(1.0,), *, flag: bool = False):
        out = self.branch(x)
        for _ in range(repeats):
            out = F.relu(self.conv1(out))
        for factor in factors:
            out = out * factor
        out = self.bn2(self.conv2(out))
        if scale is not None:
            out = out * scale
        if flag:
            return x + out, out
        return x + out


class Starred(Block):
    def forward(self, x, *rest, pads=(0, 0), **named):
        return x + self.bn2(self.conv2(F.pad(self.branch(x), pads)))


# fmt: off
class OneLine(Block):
    def forward(self, x): return x + self.bn2(self.conv2(self.branch(x)))


class Tabbed(Block):
	def forward(self, x):  # noqa: W191
		out = self.bn2(self.conv2(self.branch(x)))  # noqa: W191
		return x + out  # noqa: W191
# fmt: on


class Decorated(Block):
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def frozen(self, x):
        return self.branch(x)

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        out = self.bn2(self.conv2(self.frozen(x)))
        return x + out


def plain(x: Tensor, factor: float) -> Tensor:
    if x.size(0) > 1000:
        return x
    return torch.relu(x) * factor


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that TorchScript is on its way out
    scripted = torch.jit.script(plain)


class ScriptedFunction(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(scripted(self.bn1(self.conv1(x)), 0.5)))
        return x + out


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 0.5


class ScriptedChild(Block):
    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.act = torch.jit.script(Half())

    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return x + out


class Data(Block):
    def forward(self, x):
        self.conv1.weight.data = self.conv1.weight.data.clamp(-1, 1)
        out = self.bn2(self.conv2(self.branch(x)))
        out.kept = True
        return x.data * 0 + x + out
