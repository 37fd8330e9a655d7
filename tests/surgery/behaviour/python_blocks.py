"""Blocks with the Python that people write, in the shapes that its syntax allows."""

from __future__ import annotations

import enum
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from structure import conv, module_of
from torch import Tensor, nn


class Block(nn.Module):
    """What the blocks have in common; each has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8)
        self.drop, self.cfg, self.state = nn.Dropout(0.2), {"alpha": 0.5}, SimpleNamespace(alpha=0.75)

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


class LooksUp(Block):
    """Calls a norm's function, and leaves it in eval mode."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.bn2.eval()
        return self

    def forward(self, x):
        bn = self.bn2
        out = self.conv2(self.drop(self.branch(x)))
        out = F.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum)
        out = out * self.cfg["alpha"] * self.state.alpha
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
        return x + self.bn2(self.conv2(out))


class Mode(str, enum.Enum):  # noqa: UP042
    add = "add"
    scale = "scale"


class Arguments(Block):
    def forward(
        self, x, scale=None, repeats=1, factors=(1.0,), mode: Mode = Mode.add, *, flag: bool = False, store=None
    ):
        out = self.branch(x)
        for _ in range(repeats):
            out = F.relu(self.conv1(out))
        for factor in factors:
            out = out * factor
        out = self.bn2(self.conv2(out))
        if store is not None:
            store["out"] = out
        if scale is not None:
            out = out * scale
        if mode is Mode.scale:
            out = out * 0.5
        return (x + out, out) if flag else x + out


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


class Lambda(Block):
    forward = lambda self, x: x + self.bn2(self.conv2(self.branch(x)))  # noqa: E731


class Yields(Block):
    def steps(self, x) -> Iterator[Tensor]:
        yield x
        yield self.bn2(self.conv2(x))

    def forward(self, x):
        *_, out = self.steps(self.branch(x))
        return x + out


class Decorated(Block):
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def frozen(self, x):
        return self.branch(x)

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return x + self.bn2(self.conv2(self.frozen(x)))


def knows_itself(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that keeps something on itself, as those of transformers do."""

    @functools.wraps(function)
    def wrapper(self, x):
        wrapper.calls = getattr(wrapper, "calls", 0) + 1
        return function(self, x)

    return wrapper


class Wrapped(Block):
    @knows_itself
    def forward(self, x):
        return x + self.bn2(self.conv2(self.branch(x)))


class Descriptor:
    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return functools.partial(self.function, instance)


class Described(Block):
    @Descriptor
    def run(self, x):
        return self.bn2(self.conv2(x))

    def forward(self, x):
        return x + self.run(self.branch(x))  # type: ignore[call-arg]


class Behind(Block):
    """The branch alone."""

    def forward(self, x):
        return self.bn2(self.conv2(self.branch(x)))


class Called(Behind):
    """The skip is outside of forward."""

    def __call__(self, x):
        return x + super().__call__(x)


class Bypassed:
    def forward(self, x):
        return x + super().forward(x)  # type: ignore[misc]


class Mixed(Bypassed, Behind):
    pass


def plain(x: Tensor, factor: float) -> Tensor:
    if x.size(0) > 1000:
        return x
    return torch.relu(x) * factor


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 0.5


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that TorchScript is on its way out
    scripted, scripted_module = torch.jit.script(plain), torch.jit.script(Half())


@module_of(lambda: {"act": scripted_module}, Block)
def Scripted(self, x):
    return x + self.bn2(self.conv2(scripted(self.act(self.bn1(self.conv1(x))), 0.5)))


class Data(Block):
    def forward(self, x):
        self.conv1.weight.data = self.conv1.weight.data.clamp(-1, 1)
        out = self.bn2(self.conv2(self.branch(x)))
        out.kept = True
        return x.data * 0 + x + out


class NotInstalled:
    """What stands for a library that is not installed: whatever it is asked, it raises."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


optional_library = NotInstalled()


class Weighed(nn.Module):
    """A differentiable architecture search's mixed operation: no part of the sum is a value of its own."""

    def __init__(me, channels: int = 8) -> None:
        super().__init__()
        convs = (nn.Sequential(conv(channels, channels, kernel), nn.ReLU()) for kernel in (1, 3))
        me.ops = nn.ModuleList([*convs, nn.Identity()])
        me.alpha = nn.Parameter(torch.zeros(3))

    def forward(me, x):
        return sum(w * op(x) for w, op in zip(F.softmax(me.alpha, 0), me.ops, strict=True))
