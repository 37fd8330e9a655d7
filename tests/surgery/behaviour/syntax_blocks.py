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


class Walrus(Block):
    anything: ClassVar[Any] = Anything()

    def forward(self, x):
        if (out := self.bn2(self.conv2(self.branch(x)))).dim() == 4:
            return x + out
        return x


class Match(Block):
    def forward(self, x):
        match x.shape:
            case (_, _, h, w) if h == w:
                return x + self.bn2(self.conv2(self.branch(x)))
            case _:
                return self.bn2(self.conv2(self.branch(x))) + x


class Chained(Block):
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


class Comprehension(Block):
    def forward(self, x):
        (out,) = [conv(self.branch(x)) for conv in (self.conv2,)]
        return sum([x, self.bn2(out)])


class Swapped(Block):
    def forward(self, x):
        x, skip = self.bn2(self.conv2(self.branch(x))), x
        return x + skip


class Kept(Block):
    def forward(self, x):
        self.out = {"out": self.bn2(self.conv2(self.branch(x)))}
        total = x + self.out["out"]
        del self.out
        return total


class Subscript(Block):
    def forward(self, x):
        outs = [self.branch(x)]
        outs[0] = self.bn2(self.conv2(outs[0]))
        outs[0] += x
        return outs[0]


class Yields(Block):
    def steps(self, x) -> Iterator[Tensor]:
        x = self.branch(x)
        yield x
        x = self.bn2(self.conv2(x))
        yield x

    def forward(self, x):
        *_, out = self.steps(x)
        return x + out


class Nested(Block):
    def forward(self, x):
        def outer(y):
            def inner(z):
                nonlocal count
                count += 1
                return self.bn2(self.conv2(z))

            return inner(self.branch(y))

        count = 0
        out = outer(x)
        return x + out * count


class Partial(Block):
    def run(self, x, flag=False):
        return self.bn2(self.conv2(x)) if flag else x

    def forward(self, x):
        return x + functools.partial(self.run, flag=True)(self.branch(x))


class Reduced(Block):
    def forward(self, x):
        layers = [self.conv1, self.bn1, F.relu, self.conv2, self.bn2]
        return x + functools.reduce(lambda y, layer: layer(y), layers, x)


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
