"""The table of structures: each a small network with the plan that an expert would write.

A network, or the block that it has twice, is a class, or no more than a forward and the parts that it calls.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Structure:
    """A network, and what is expected of it.

    Attributes:
        build: makes the network.
        inputs: what it is called with.
        sites: the paths of its SE modules, each with the number of channels.
        kind: of its blocks.
        after: the layer behind which SE is in each of them, if it is the same.
        skipped: blocks that are left out, each with a part of the reason.
        refused: where nothing can be retrofitted, a part of the reason.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    sites: Mapping[str, int] = field(default_factory=dict)
    kind: str = "residual"
    after: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""


STRUCTURES: dict[str, Structure] = {}


def module_of(parts: Parts, base: type[nn.Module] = nn.Module) -> Callable[[Callable[..., Any]], type[nn.Module]]:
    """Make a class of a forward; ``parts`` makes its attributes of what the class is called with."""

    def made(forward: Callable[..., Any]) -> type[nn.Module]:
        def __init__(self: nn.Module, *args: Any) -> None:
            base.__init__(self)
            for name, part in parts(*args).items():
                setattr(self, name, part)

        members = {"__init__": __init__, "forward": forward, "__module__": forward.__module__}
        return type(forward.__name__, (base,), members)

    return made


def structure(*inputs: Any, parts: Parts | None = None, **facts: Any) -> Callable[[Any], type[nn.Module]]:
    """Put a network into the table, with the facts of a ``Structure``; the paths of sites come without ``se_attention``."""

    def noted(network: Any) -> type[nn.Module]:
        cls: type[nn.Module] = network if parts is None else module_of(parts)(network)
        STRUCTURES[cls.__name__] = Structure(cls, inputs, **facts)
        return cls

    return noted


CONVS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[Any]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def conv(inputs: int, outputs: int, kernel: Any = 3, dims: int = 2, **options: Any) -> Any:
    """A convolution that keeps the size."""
    return CONVS[dims](inputs, outputs, kernel, padding="same", **options)


def unit(inputs: int, outputs: int, kernel: Any = 3, dims: int = 2, **options: Any) -> nn.Sequential:
    """Convolution, norm, activation."""
    return nn.Sequential(conv(inputs, outputs, kernel, dims, **options), NORMS[dims](outputs), nn.ReLU())


def convs(*widths: int) -> list[nn.Module]:
    """Several such units, one layer after the other."""
    return [layer for inputs, outputs in itertools.pairwise(widths) for layer in unit(inputs, outputs)]


class Unit(nn.Module):
    """A residual unit."""

    def __init__(self, channels: int = 8, dims: int = 2, kernel: Any = 3) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, channels, kernel, dims), NORMS[dims](channels)
        self.conv2, self.norm2 = conv(channels, channels, kernel, dims), NORMS[dims](channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(y))).relu()


class Branch(nn.Module):
    """What is joined with something, each time in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1, self.conv2 = nn.BatchNorm2d(8), conv(8, 8), conv(8, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(self.norm1(x))))


IMAGE = torch.randn(2, 3, 10, 10)


class Net(nn.Module):
    """A stem and two blocks of a kind, which are given what else the network is given."""

    def __init__(self, block: Callable[[], nn.Module] = Branch, example: Tensor = IMAGE) -> None:
        super().__init__()
        self.stem = conv(example.shape[1], 8, dims=example.dim() - 2)
        self.block1, self.block2 = block(), block()

    def forward(self, x, *args, **kwargs):
        x = self.block1(self.stem(x), *args, **kwargs)
        while not isinstance(x, Tensor):
            x = x["out"] if isinstance(x, dict) else x[0]
        return self.block2(x, *args, **kwargs)


def joined(
    after: str = "conv2",
    *others: Tensor,
    parts: Parts | None = None,
    example: Tensor = IMAGE,
    kind: str = "residual",
    channels: int = 8,
    at: tuple[str, ...] = ("",),
    name: str = "",
) -> Callable[[Any], type[nn.Module]]:
    """A network of two such blocks, with SE behind one of their layers, and at one of their modules or more; a forward without
    parts is one of a ``Branch``."""

    def noted(block: Any) -> type[nn.Module]:
        if not isinstance(block, type):
            block = module_of(parts or dict, nn.Module if parts else Branch)(block)
        sites = {f"block{i}{end}": channels for i in (1, 2) for end in at}
        build = functools.partial(Net, block, example)
        STRUCTURES[name or block.__name__] = Structure(build, (example, *others), sites, kind, after)
        return block

    return noted
