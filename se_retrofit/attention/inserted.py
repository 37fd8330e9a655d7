"""The base class of all inserted modules, and the description of a place that is passed to a factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, brief, check_positive
from .parts import scale, squeeze

torch.fx.wrap("scale")
torch.fx.wrap("squeeze")


@dataclass(frozen=True)
class Slot:
    """A place where a module is inserted.

    Attributes:
        channels: number of channels C of the module's input.
        channel_dim: the channel dim of the input, counted from the end: -3 in ``(N, C, H, W)``, -1 in ``(N, H, W, C)``.
        shape: shape of the input as it was recorded, including the batch.
        kind: the block's: ``"residual"``, ``"inverted"``, ``"dense"``, ``"multi-branch"``, ``"rep-sum"``, ``"chain"``.
        block: path of the block in the model.
        dtype: dtype of the input, and therefore of the module's parameters.
        device: the device to build the module on: the CPU, from which it is moved to the input's device, or meta, if
            its parameters need no values.
        inplace: whether the module may change its input in place if no gradient is needed.
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
        """The arguments that all built-in attentions accept: ``channel_dim``, ``inplace``, ``device`` and ``dtype``."""
        return {
            "channel_dim": self.channel_dim,
            "inplace": self.inplace,
            "device": self.device,
            "dtype": self.dtype,
        }


class Inserted(nn.Module):
    """Base class of all inserted modules, by which undo, saving, printouts and costs find them.

    A subclass takes and returns a value ``(N, C, *spatial)`` or ``(N, *spatial, C)``, according to ``channel_dim``.
    Other modules are wrapped in ``FromIdentity`` when they are inserted; a subclass is inserted as it is, and must
    itself start as an exact identity. If its effect is a factor for each channel, it defines ``gates(x) -> (N, C)`` and
    no ``forward``; folding, gate statistics and gate plots use that method.

    Args:
        channel: number of channels C.
        channel_dim: as for ``SEAttention``.
        inplace: change the input itself instead of a copy if no gradient is needed.

    Attributes:
        site, plan: the site and the plan of the retrofit that inserted the module; None if no retrofit did.
        gate_range: lower and upper bound of the gates, which they approach but never reach; None if they have none.
        gate_layer: name of the child whose output is the gates, ``(..., C)``, so that a hook need not recompute them.

    Raises:
        RetrofitError: If an argument is out of range.
        TypeError: If an argument is of the wrong type.
    """

    # no annotations: torch.jit.script would read them
    site = cast(Any, None)
    plan = cast(Any, None)
    gate_range = cast(Any, None)
    gate_layer = ""
    channel = cast(Any, None)

    def __init__(self, channel: int, channel_dim: int = 1, inplace: bool = False) -> None:
        super().__init__()
        check_positive("channel", channel)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim must be an int, got {brief(channel_dim)}")
        if channel_dim == 0:
            raise RetrofitError("channel_dim=0 is the batch; give 1 for (N, C, *spatial) or -1 for (N, *spatial, C)")
        vars(self)["channel"] = channel  # a property of some classes
        self.channel_dim = channel_dim
        self.inplace = inplace
        self.qconfig: Any = None  # the eager mode of torch.ao.quantization leaves it in floating point

    def squeezed(self, x: Tensor, largest: bool = False) -> Tensor:
        """Return the means (or the maxima) over all spatial dims, ``(N, C)``."""
        return squeeze(x, self.channel_dim, largest)

    def scaled(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the product with a gate for each channel, ``(N, C)`` or ``(C,)``."""
        # a trace by torch.jit must be valid in both grad modes
        return scale(x, gate, self.channel_dim, self.inplace and not torch.jit.is_tracing())

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.gates(x))  # type: ignore[operator]

    def summary(self) -> str:
        """Describe the module in few words, for printouts: ``ECA 64``."""
        return f"{type(self).__name__} {self.channel}"

    def extra_repr(self) -> str:
        return str(self.channel) + ("" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}")


def has_gates(module: nn.Module) -> bool:
    """Return whether a module has the method ``gates(x) -> (N, C)``."""
    return callable(getattr(module, "gates", None))


def check_gates(modules: Mapping[str, nn.Module], what: str) -> None:
    """Raise an error if an inserted module has no gates for each channel; ``what`` says what is impossible then."""
    for path, module in modules.items():
        if not has_gates(module):
            words = module.summary() if isinstance(module, Inserted) else type(module).__name__
            raise RetrofitError(f"{path} is {words}, which has no gates for each channel (no method gates), so {what}")
