"""A learned factor for each channel: SE without its squeeze."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inserted import Inserted


class StaticFactor(Inserted):
    """A learned factor for each channel, independent of the input (the scale of SSF, Lian et al., arXiv:2210.08823).

    It starts at exactly 1. It is a control for what the squeeze and the excitation of SE add, and it replaces constant
    gates that can't be folded into a weight.

    Args:
        channel: number of channels C of the feature maps.
        channel_dim, inplace, device, dtype: as for ``SEAttention``.

    Shape:
        ``(N, C, *spatial)`` or ``(N, *spatial, C)`` with any number of spatial dims, to the same shape.

    Example:
        >>> import torch
        >>> from se_retrofit.attention import StaticFactor
        >>> x = torch.randn(1, 64, 32, 32)
        >>> torch.equal(StaticFactor(64)(x), x)
        True
    """

    def __init__(self, channel: int, *, device: Any = None, dtype: Any = None, **where: Any) -> None:
        super().__init__(channel, **where)
        self.factor = nn.Parameter(torch.empty(channel, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def channel(self) -> int:
        return len(self.factor)

    def reset_parameters(self) -> None:
        """Set all factors to 1."""
        nn.init.ones_(self.factor)

    def gates(self, x: Tensor) -> Tensor:
        """Return the factors as the gates for an input, ``(N, C)``."""
        return self.factor.expand(x.shape[0], -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.factor)

    def summary(self) -> str:
        return f"a factor for each of {self.channel} channels"
