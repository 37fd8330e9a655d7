"""The table of structures: each a small network with the plan that an expert would write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["STRUCTURES", "Structure", "conv", "structure", "unit"]


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


def structure(*inputs: Any, **facts: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Put a network into the table, with the facts of a ``Structure``; the paths of sites come without ``se_attention``."""

    def noted(cls: type[nn.Module]) -> type[nn.Module]:
        assert cls.__name__ not in STRUCTURES, "two networks of one name"
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


class Unit(nn.Module):
    """A residual unit."""

    def __init__(self, channels: int = 8, dims: int = 2, kernel: Any = 3) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels, channels, kernel, dims), NORMS[dims](channels)
        self.conv2, self.norm2 = conv(channels, channels, kernel, dims), NORMS[dims](channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(y))).relu()
