"""Convolutional Block Attention Module: a gate for each channel, then one for each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError
from .inserted import Inserted
from .parts import TwiceSigmoid, bottleneck, check_kernel, hidden_width, init_bottleneck, undrawn


def over_channels(x: Tensor, channel_dim: int, dims: int) -> Tensor:
    """Return the mean and the maximum over the channels as two maps, ``(N, 2, *spatial)``."""
    channel = channel_dim % x.dim()
    maps = torch.stack([x.mean(channel), x.amax(channel)], -1 - dims)
    return maps.unsqueeze(0).flatten(0, -2 - dims)


def scale_positions(x: Tensor, gate: Tensor, channel_dim: int) -> Tensor:
    """Multiply each position of ``x`` by its gate, ``(N, 1, *spatial)``."""
    shape = list(x.shape)
    shape[channel_dim % x.dim()] = 1
    return x * gate.reshape(shape).to(x.dtype)


torch.fx.wrap("over_channels")
torch.fx.wrap("scale_positions")


class CBAM(Inserted):
    """Convolutional Block Attention Module (Woo et al., arXiv:1807.06521). It starts as an exact identity, because both
    gates are ``2 * sigmoid`` and their last layers start at zero; it learns from the first step on.

    First, a gate for each channel: a shared bottleneck of two linear layers is applied to the means and to the maxima
    of the channels, and the two results are added. Then, a gate for each position: a convolution with a large kernel
    over the mean and the maximum of the channels.

    Args:
        channel: number of channels C of the feature maps.
        reduction, bias, min_hidden: options of the bottleneck, as for ``SEAttention``.
        kernel_size: kernel size of the convolution over the positions, odd.
        dims: number of spatial dims: 1, 2 or 3.
        channel_dim, inplace, device, dtype: as for ``SEAttention``.

    Shape:
        ``(N, C, *spatial)`` or ``(N, *spatial, C)``, to the same shape.

    Raises:
        RetrofitError: If an option is out of range.
        TypeError: If an option is of the wrong type.

    Example:
        >>> import torch
        >>> from se_retrofit.attention import CBAM
        >>> x = torch.randn(1, 64, 32, 32)
        >>> torch.equal(CBAM(64)(x), x)
        True
    """

    def __init__(
        self,
        channel: int,
        reduction: int = 8,
        *,
        bias: bool = False,
        min_hidden: int = 1,
        kernel_size: int = 7,
        dims: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **where: Any,
    ) -> None:
        super().__init__(channel, **where)
        check_kernel(kernel_size)
        if dims not in (1, 2, 3):
            raise RetrofitError(f"CBAM needs 1, 2 or 3 spatial dims, got {dims}")
        self.hidden = hidden_width(channel, reduction, min_hidden)
        self.dims = dims
        factory = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(*bottleneck(channel, self.hidden, bias, **factory))
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = undrawn(conv, 2, 1, kernel_size, padding=kernel_size // 2, bias=False, **factory)
        self.gate = TwiceSigmoid()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw the first layer of the bottleneck, and set the last layer of both gates to zero."""
        if self.conv.weight.is_meta:
            return
        init_bottleneck(self.mlp[0], self.mlp[2])
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim
        x = self.scaled(x, self.gate(self.mlp(self.squeezed(x)) + self.mlp(self.squeezed(x, largest=True))))
        return scale_positions(x, self.gate(self.conv(over_channels(x, dim, self.dims))), dim)

    def summary(self) -> str:
        return f"CBAM {self.channel} -> {self.hidden} -> {self.channel}, kernel {self.conv.kernel_size[0]}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden={self.hidden}"
