"""Efficient Channel Attention: the gate of each channel depends on its own mean and those of its neighbours."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .inserted import Inserted
from .parts import TwiceSigmoid, check_kernel, undrawn


class ECA(Inserted):
    """Efficient Channel Attention (Wang et al., arXiv:1910.03151): channel means are convolved along the channels.

    The gate is ``2 * sigmoid`` and the kernel starts at zero, so all gates are exactly 1.0 at first. The kernel learns
    from the first step on.

    Args:
        channel: number of channels C of the feature maps.
        kernel_size: of the convolution over the channels, odd; None for the paper's, ``(log2(C) + 1) / 2`` made odd.
        channel_dim, inplace, device, dtype: as for ``SEAttention``.

    Shape:
        ``(N, C, *spatial)`` or ``(N, *spatial, C)`` with any number of spatial dims, to the same shape.

    Raises:
        RetrofitError: If an option is out of range.
        TypeError: If an option is of the wrong type.

    Example:
        >>> import torch
        >>> from se_retrofit.attention import ECA
        >>> eca, x = ECA(64), torch.randn(1, 64, 32, 32)
        >>> eca.conv.kernel_size, torch.equal(eca(x), x)
        ((3,), True)
    """

    gate_range = (0.0, 2.0)
    gate_layer = "gate"

    def __init__(
        self, channel: int, kernel_size: int | None = None, *, device: Any = None, dtype: Any = None, **where: Any
    ) -> None:
        super().__init__(channel, **where)
        if kernel_size is None:
            width = int(abs((math.log2(channel) + 1) / 2))
            kernel_size = width if width % 2 else width + 1
        check_kernel(kernel_size)
        self.conv = undrawn(
            nn.Conv1d, 1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )
        self.gate = TwiceSigmoid()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the kernel to zero."""
        nn.init.zeros_(self.conv.weight)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates for an input, ``(N, C)``."""
        z = self.squeezed(x)
        # (N, C) -> (N, 1, C), for any number of dims before C
        rows = z.unsqueeze(0).unsqueeze(-2).flatten(0, -3)
        return self.gate(self.conv(rows).reshape(z.shape))

    def summary(self) -> str:
        return f"ECA {self.channel}, kernel {self.conv.kernel_size[0]}"
