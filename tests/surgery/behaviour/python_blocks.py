"""Blocks with the Python that people write in a forward."""

from __future__ import annotations

import math
import random
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


class PythonRandom(Block):
    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        out = self.bn2(self.conv2(self.branch(x)))
        return x + out


class NumpyRandom(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        if self.training:
            out = out * float(np.random.beta(0.5, 0.5))
        return x + out / np.sqrt(2)


class ManifoldMixup(Block):
    """The inputs of the block are mixed among the images of the batch, at random."""

    def forward(self, x):
        if self.training and np.random.rand() < 0.8:
            share, other = np.random.beta(2.0, 2.0), torch.randperm(x.shape[0])
            x = share * x + (1 - share) * x[other]
        out = self.bn2(self.conv2(self.branch(x)))
        return x + out


class TorchRandomItem(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return x + out


class SizedNoise(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        if self.training:
            out = out * torch.rand(x.shape[0], 1, 1, 1).to(x)
        return x + out


class Collecting(Block):
    def forward(self, x):
        out = self.branch(x)
        self.feats.append(tuple(out.shape))
        self.calls += 1
        out = self.bn2(self.conv2(out))
        return x + out


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


class Tries(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        try:
            if out.max().item() > 1e6:
                raise OverflowError
        except OverflowError:
            out = out.clamp(max=1e6)
        return x + out


class LooksAtValues(Block):
    def forward(self, x):
        if x.mean() > 0.3:
            x = x - 0.25
        out = self.bn2(self.conv2(self.branch(x)))
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


class Ceil(Block):
    def forward(self, x):
        size = math.ceil(x.shape[-1] / 3)
        out = F.interpolate(F.adaptive_avg_pool2d(self.branch(x), size), size=x.shape[-2:])
        out = self.bn2(self.conv2(out))
        return x + out


class SamePadding(Block):
    """TensorFlow's SAME padding."""

    def forward(self, x):
        h, w = x.shape[-2:]
        ph, pw = max((math.ceil(h / 1) - 1) + 3 - h, 0), max((math.ceil(w / 1) - 1) + 3 - w, 0)
        out = F.pad(self.branch(x), [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2])
        out = self.bn2(F.conv2d(out, self.conv2.weight, self.conv2.bias))
        return x + out


class GroupsByBatch(Block):
    def forward(self, x):
        b, c, h, w = x.shape
        weight = self.conv1.weight[:, :1].repeat(b, 1, 1, 1)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b * c).view(b, c, h, w)
        out = self.bn2(self.conv2(F.relu(out)))
        return x + out


class Loop(Block):
    def forward(self, x):
        y = x
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            y = norm(conv(F.relu(y)))
        return x + y


class Comprehension(Block):
    def forward(self, x):
        parts = [norm(conv(x)) for conv, norm in zip([self.conv1, self.conv2], [self.bn1, self.bn2], strict=True)]
        out = F.relu(torch.cat(parts, 1))
        return out[:, : self.channels] + out[:, self.channels :]


class Lambda(Block):
    def forward(self, x):
        run = lambda y: self.bn2(self.conv2(F.relu(y)))  # noqa: E731
        return x + run(self.bn1(self.conv1(x)))


def helper(conv, norm, x):
    x = conv(F.relu(x))
    return norm(x)


class Helped(Block):
    def forward(self, x):
        return x + helper(self.conv2, self.bn2, self.bn1(self.conv1(x)))


class InPlace(Block):
    def forward(self, x):
        out = self.conv1(x)
        out += self.conv2(x)
        F.relu_(out)
        out = self.bn2(self.conv2(out))
        out += x
        return out


class Statement(Block):
    """The value is made in place, and the expression's result is dropped."""

    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        out.mul_(0.5).clamp_(-3, 3)
        return x + out


class Walrus(Block):
    def forward(self, x):
        if (out := self.bn2(self.conv2(self.branch(x)))).shape[0] > 0:
            return x + out
        return x


# fmt: off
class OneLine(Block):
    def forward(self, x): return x + self.bn2(self.conv2(self.branch(x)))


class ManyLines(Block):
    def forward(
        self,
        x,  # the author's comments stay
    ):
        out = self.bn2(
            self.conv2(  # è, a letter of two bytes
                self.branch(x)
            )
        )
        return (
            x
            + out
        )


class Chained(Block):
    def forward(self, x):
        out = (
            self.conv2(self.branch(x))
            .mul(0.5)
            .add(0.1)
        )
        return x + out


class Tabbed(Block):
	def forward(self, x):  # noqa: W191
		out = self.bn2(self.conv2(self.branch(x)))  # noqa: W191
		return x + out  # noqa: W191
# fmt: on
