"""Blocks in the shapes that Python's syntax allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from python_blocks import Block
from torch import Tensor, nn


class NotInstalled:
    """What stands for a library that is not installed: whatever it is asked, it raises."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


class Anything:
    def __getattr__(self, name: str) -> Any:
        return self


optional_library = NotInstalled()


class Chained(Block):
    anything: ClassVar[Any] = Anything()

    def forward(self, x):
        out = (
            self
            .bn2(
                self  # of this block
                .conv2(self.branch(x))
            )
            .contiguous()
            .clamp(-3, 3)
        )  # fmt: skip
        return (
            out
            .mul(0.5)
            .add(x)
            .relu()
        )  # fmt: skip


class Characters(Block):
    def forward(self, x):
        text = '''two
lines'''; ñ = {"é→": self.bn2(self.conv2(self.branch(x)))}["é→"]; σ = """of
text"""; return x + ñ * (len(text) + len(σ))  # noqa: E702  # fmt: skip


class Lambda(Block):
    forward = lambda self, x: x + self.bn2(self.conv2(self.branch(x)))  # noqa: E731


class Yields(Block):
    def steps(self, x) -> Iterator[Tensor]:
        x = self.branch(x)
        yield x
        x = self.bn2(self.conv2(x))
        yield x

    def forward(self, x):
        *_, out = self.steps(x)
        return x + out


class Rebound(Block):
    """``self`` is another name's by the time that SE is called."""

    def forward(self, x):
        block = self
        del self
        return x + block.bn2(block.conv2(block.branch(x)))


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


class Weighed(nn.Module):
    """A differentiable architecture search's mixed operation: no part of the sum is a value of its own."""

    def __init__(me, channels: int = 8) -> None:
        super().__init__()
        me.ops = nn.ModuleList([nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()), nn.Identity()])
        me.ops.insert(0, nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU()))
        me.alpha = nn.Parameter(torch.zeros(3))

    def forward(me, x):
        return sum(w * op(x) for w, op in zip(F.softmax(me.alpha, 0), me.ops, strict=True))
