"""Blocks whose classes do what classes can do."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import OrderedDict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from python_blocks import Block
from structure import conv, module_of
from torch import Tensor, nn

REGISTRY: list[type] = []
CACHE: dict[int, Tensor] = {}
COUNTS = {"forward": 0}


class Base(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        return x + out


class Registered(Block):
    instances: ClassVar[int] = 0

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY.append(cls)


class Named(Registered, name="named"):
    def forward(self, x):
        type(self).instances += 1
        COUNTS["forward"] += 1
        return x + self.bn2(self.conv2(self.branch(x)))


class Copies(Base):
    """Its copy is itself."""

    def __deepcopy__(self, memo):
        return self


class Mover(Base):
    """Keeps copies of itself in the memo, as the documentation of ``copy`` has it; they are built anew, and draw random numbers."""

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        memo[id(self)] = new = type(self)()
        new.load_state_dict(self.state_dict())
        return new.train(self.training)


class KnowsParent(nn.Module):
    class Child(Block):
        parent: Any = None

        def forward(self, x):
            return x + self.bn2(self.conv2(self.branch(x) * self.parent().alpha))

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.child = 0.5, self.Child()
        self.child.parent = weakref.ref(self)

    def forward(self, x):
        return self.child(x)

    def __getstate__(self):
        return self.__dict__


@functools.lru_cache(maxsize=1)
def grid(n: int) -> Tensor:
    return torch.linspace(-1, 1, n)


class Cached(Block):
    def forward(self, x):
        n = x.shape[-1]
        if n not in CACHE:
            CACHE[n] = torch.ones(n, device=x.device, dtype=x.dtype) * 0.5
        return x + self.bn2(self.conv2(self.branch(x) * CACHE[n] + grid(n).to(x)))


class Yes:
    def __call__(self, *args):
        return None


class NeverRaises(Base):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return Yes()


def odd_names() -> dict[str, Any]:
    layers = nn.ModuleDict({"class": conv(8, 8), "in": nn.ReLU()})
    return {"my_hooks": {"a": 1}, "post_hooks": [0.5], "layers": layers}


@module_of(odd_names, Block)
def OddNames(self, x):
    out = self.layers["in"](self.layers["class"](x))
    return x + self.bn2(self.conv2(out * self.post_hooks[0] * self.my_hooks["a"]))


class DictResult(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        return OrderedDict(out=x + out, skip=x)


@module_of(lambda: {"conv1": conv(8, 8), "act": nn.ReLU(), "conv2": conv(8, 8)})
def Children(self, x):
    out = x
    for child in self.children():
        out = child(out)
    return x + out


class Derived(Base):
    def forward(self, x):
        return F.relu(super().forward(x))


class Diamond(Derived):
    def forward(self, x):
        return super(Derived, self).forward(x) * 2 + super().forward(x)


class Private(Block):
    __factor = 0.5

    def __scaled(self, x):
        return self.bn2(self.conv2(x)) * self.__factor

    def forward(self, x):
        return x + self.__scaled(self.branch(x))


def made(factor: float) -> type[Block]:
    class Made(Block):
        def forward(self, x):
            out = self.bn2(self.conv2(self.branch(x)))
            return x + out * factor

    return Made


@module_of(lambda: {"lock": threading.Lock()}, Block)
def Locked(self, x):
    with self.lock:
        return x + self.bn2(self.conv2(self.branch(x)))


class Property(Block):
    @property
    def body(self):
        return nn.Sequential(self.conv1, nn.ReLU(), self.conv2)

    def forward(self, x):
        return x + self.bn2(self.body(x))


class KnowsClass(Base):
    def branch(self, x):
        return super().branch(x) * (0.5 if type(self) is KnowsClass else 2.0)


class CountsChildren(Base):
    def branch(self, x):
        return super().branch(x) * len(list(self.children()))


class Timed(Base):
    """Takes another number in each run."""

    def branch(self, x):
        return super().branch(x) + time.perf_counter() * 1e-40


class SetForward(nn.Module):
    """A function that was made in ``__init__`` holds the module's children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.run = lambda x: self.norm(self.conv(x))

    def forward(self, x):
        return x + F.relu(self.run(x))


WITHOUT_SOURCE = """
class Sourceless(nn.Module):
    def forward(self, x):
        return x + self.inner(x)


class Inner(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))
"""


def sourceless() -> nn.Module:
    scope = {"nn": nn, "F": F, "__name__": __name__}
    exec(compile(WITHOUT_SOURCE, "<string>", "exec"), scope)
    block = scope["Sourceless"]()
    block.inner = scope["Inner"](8, 8, 3, padding=1)
    return block
