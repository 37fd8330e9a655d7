"""What the surgery inserts, whatever it computes; and what a factory is told about the place that it goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, brief
from .parts import check_positive, scale, squeeze

__all__ = ["Inserted", "Slot", "check_gates", "has_gates"]

torch.fx.wrap("scale")
torch.fx.wrap("squeeze")


@dataclass(frozen=True)
class Slot:
    """A place that gets a module.

    Attributes:
        channels: number of channels C of the value that the module is given.
        channel_dim: which dim of the value holds them, counted from the end: -3 in ``(N, C, H, W)``, -1 in ``(N, H, W, C)``.
        shape: of the value, as it was recorded, the batch included.
        kind: of the block: ``"residual"``, ``"inverted"``, ``"dense"``, ``"multi-branch"``, ``"rep-sum"``, ``"chain"``.
        block: the block's path in the model.
        dtype: of the value, and so of the module's parameters.
        device: where to build the module: the CPU, from where it is moved to the value's device, or meta, where its parameters
            have no values.
        inplace: whether the module may change its input in place, where no gradient is needed.
    """

    channels: int
    channel_dim: int
    shape: tuple[int, ...]
    kind: str
    block: str
    dtype: torch.dtype
    device: torch.device
    inplace: bool = False

    @property
    def dims(self) -> int:
        """Number of spatial dims."""
        return -1 - self.channel_dim if self.channel_dim < -1 else len(self.shape) - 2

    @property
    def where(self) -> dict[str, Any]:
        """The arguments that every built-in attention takes: ``channel_dim``, ``inplace``, ``device`` and ``dtype``."""
        return {
            "channel_dim": self.channel_dim,
            "inplace": self.inplace,
            "device": self.device,
            "dtype": self.dtype,
        }


class Inserted(nn.Module):
    """Base class of the modules that the surgery inserts: undo, saving, printouts and costs look for these.

    A subclass takes and returns a value ``(N, C, *spatial)`` or ``(N, *spatial, C)``, as ``channel_dim`` says. What is not an
    ``Inserted`` is wrapped in ``FromIdentity`` when it is inserted; a subclass is inserted as it is, and so has to start as an
    exact identity by its own construction. Where its effect is a factor for each channel, it has the method
    ``gates(x) -> (N, C)`` and no ``forward`` of its own; folding, the statistics of gates and their pictures ask for it.

    Args:
        channel: number of channels C.
        channel_dim: as of ``SEAttention``.
        inplace: where no gradient is needed, change the input itself instead of a copy.

    Attributes:
        site, plan: where a retrofit put the module, and by which plan; None for one that no retrofit put in.
        gate_range: the ends of the range of the gates, which they come close to but never reach; None where there are none.
        gate_layer: name of the child whose output is the gates, ``(..., C)``, so that who listens need not compute them again.

    Raises:
        RetrofitError: an argument is out of range.
        TypeError: an argument is of the wrong type.
    """

    # no annotations: torch.jit.script would read them
    site = cast(Any, None)
    plan = cast(Any, None)
    gate_range = cast(Any, None)
    gate_layer = ""

    def __init__(self, channel: int, channel_dim: int = 1, inplace: bool = False) -> None:
        super().__init__()
        check_positive("channel", channel)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim must be an int, got {brief(channel_dim)}")
        if channel_dim == 0:
            raise RetrofitError("channel_dim=0 is the batch; give 1 for (N, C, *spatial) or -1 for (N, *spatial, C)")
        self.channel = channel
        self.channel_dim = channel_dim
        self.inplace = inplace

    def squeezed(self, x: Tensor, largest: bool = False) -> Tensor:
        """The means, or the largest values, over all spatial dims: ``(N, C)``."""
        return squeeze(x, self.channel_dim, largest)

    def scaled(self, x: Tensor, gate: Tensor) -> Tensor:
        """The product with a gate for each channel, ``(N, C)`` or ``(C,)``."""
        # a trace by torch.jit holds for both grad modes
        return scale(x, gate, self.channel_dim, self.inplace and not torch.jit.is_tracing())

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.gates(x))  # type: ignore[operator]

    def summary(self) -> str:
        """The module in few words, for printouts: ``ECA 64``."""
        return f"{type(self).__name__} {self.channel}"

    def extra_repr(self) -> str:
        return str(self.channel) + ("" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}")


def has_gates(module: nn.Module) -> bool:
    """Whether a module can tell its gates, ``gates(x) -> (N, C)``."""
    return callable(getattr(module, "gates", None))


def check_gates(modules: Mapping[str, nn.Module], what: str) -> None:
    """Refuse inserted modules, by path, that have no gates for each channel; ``what`` says what can't be had then."""
    for path, module in modules.items():
        if not has_gates(module):
            words = module.summary() if isinstance(module, Inserted) else type(module).__name__
            raise RetrofitError(f"{path} is {words}, which has no gates for each channel (no method gates), so {what}")
