"""Any module as an exact identity at first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inserted import Inserted
from .parts import broadcast

__all__ = ["FromIdentity"]


def channels_second(x: Tensor, channel_dim: int) -> Tensor:
    """``(N, *spatial, C)`` as ``(N, C, *spatial)``; other values as they are."""
    return x.movedim(-1, 1) if channel_dim == -1 and x.dim() > 2 else x


def blend(x: Tensor, y: Tensor, alpha: Tensor, channel_dim: int) -> Tensor:
    """``x + alpha * (y - x)``, with an alpha for each channel; y has its channels second."""
    if channel_dim == -1 and x.dim() > 2:
        y = y.movedim(1, -1)
    return torch.lerp(x, y.to(x.dtype), broadcast(alpha, x, channel_dim))


torch.fx.wrap("blend")
torch.fx.wrap("channels_second")


class FromIdentity(Inserted):
    """A module f as a learned step away from the identity: ``x + alpha * (f(x) - x)``, with an alpha for each channel.

    Alpha starts at zero, so that the output and the gradient of ``x`` are exactly those of the identity, as long as f gives
    finite values. Alpha learns from the first step on, and f from the second.

    Args:
        module: f, which takes and returns ``(N, C, *spatial)``.
        channel: number of channels C of the feature maps.
        channel_dim: as of ``SEAttention``; values with their channels last are permuted for f, and back.
        device, dtype: of alpha.

    Shape:
        ``(N, C, *spatial)`` or ``(N, *spatial, C)``, to the same shape.

    Example:
        >>> import torch
        >>> from timm.layers.coord_attn import CoordAttn
        >>> from se_retrofit.attention import FromIdentity
        >>> x = torch.randn(2, 64, 32, 32)
        >>> torch.equal(FromIdentity(CoordAttn(64), 64)(x), x)
        True
    """

    def __init__(self, module: nn.Module, channel: int, *, device: Any = None, dtype: Any = None, **where: Any) -> None:
        super().__init__(channel, **where)
        self.f = module
        self.alpha = nn.Parameter(torch.empty(channel, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set alpha to zero; f stays as it is."""
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - a block of its own is not compiled by torch.jit.script
            if type(x) is Tensor and not torch.compiler.is_compiling() and x.numel() == 0:
                return blend(
                    x, channels_second(x, self.channel_dim), self.alpha, self.channel_dim
                )  # f may take no empty batch
        return blend(x, self.f(channels_second(x, self.channel_dim)), self.alpha, self.channel_dim)

    def summary(self) -> str:
        return f"{type(self.f).__name__} {self.channel}"
