"""A wrapper that makes any module start as an exact identity, and a check of the module before it is inserted."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError
from .inserted import Inserted, Slot
from .parts import broadcast


def channels_second(x: Tensor, channel_dim: int) -> Tensor:
    """Permute ``(N, *spatial, C)`` to ``(N, C, *spatial)``; return other values as they are."""
    return x.movedim(-1, 1) if channel_dim == -1 and x.dim() > 2 else x


def blend(x: Tensor, y: Tensor, alpha: Tensor, channel_dim: int) -> Tensor:
    """Compute ``x + alpha * (y - x)`` with an alpha for each channel; y has its channels in the second dim."""
    if channel_dim == -1 and x.dim() > 2:
        y = y.movedim(1, -1)
    return torch.lerp(x, y.to(x.dtype), broadcast(alpha, x, channel_dim))


torch.fx.wrap("blend")
torch.fx.wrap("channels_second")


class FromIdentity(Inserted):
    """A learned step from the identity to a module f: ``x + alpha * (f(x) - x)``, with an alpha for each channel.

    Alpha starts at zero, so the output and the gradient of ``x`` are exactly those of the identity, as long as f
    returns finite values. Alpha learns from the first step on, and f from the second.

    Args:
        module: f, which takes and returns ``(N, C, *spatial)``.
        channel: number of channels C of the feature maps.
        channel_dim: as for ``SEAttention``; values with their channels last are permuted for f, and back.
        device, dtype: device and dtype of alpha.

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
        """Set alpha to zero; f is not changed."""
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - a block of its own is not compiled by torch.jit.script
            if type(x) is Tensor and not torch.compiler.is_compiling() and x.numel() == 0:
                y = channels_second(x, self.channel_dim)  # f may not support empty batches
                return blend(x, y, self.alpha, self.channel_dim)
        return blend(x, self.f(channels_second(x, self.channel_dim)), self.alpha, self.channel_dim)

    def summary(self) -> str:
        return f"{type(self.f).__name__} {self.channel}"


def check_made(module: nn.Module, slot: Slot, name: str) -> None:
    """Run a copy of a factory's module in train mode on random values of the slot's shape, on the CPU and in float32.

    A module that draws random numbers changes nothing in eval mode, but in train mode it changes every later draw of
    the network, such as those of its dropout. This is allowed, with a warning.

    Raises:
        RetrofitError: If the module can't be run, returns another shape, changes its input, or returns values that are
            not finite (then it would not be an identity: 0 * inf is NaN).

    Warns:
        UserWarning: If the module draws random numbers.
    """
    has_values = not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
    device = "cpu" if has_values else "meta"
    what = f"attention={name}, in block {slot.block or '(model)'},"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.randn(slot.shape, device=device)
        given = x if isinstance(module, Inserted) else channels_second(x, slot.channel_dim)
        state, version = torch.get_rng_state(), x._version
        try:
            found = copy.deepcopy(module).to(device, torch.float32).train()(given)
        except Exception as error:
            raise RetrofitError(
                f"{what} can't be run on a value of shape {tuple(given.shape)}: {type(error).__name__}: {error}"
            ) from error
        drawn = not torch.equal(state, torch.get_rng_state())
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(given.shape):
        raise RetrofitError(f"{what} must return the shape that it is given, {tuple(given.shape)}, but returns {shape}")
    if x._version != version and not isinstance(module, Inserted):
        raise RetrofitError(f"{what} changes its input in place, but its output has to be compared with that input")
    if has_values and not found.isfinite().all():
        raise RetrofitError(f"{what} returns non-finite values for a finite input, so it can't start as an identity")
    if drawn:
        warnings.warn(
            f"attention={name} draws random numbers in train mode, so the network's own draws (its dropout, say) will "
            "differ from those without it; in eval mode it is an exact identity",
            stacklevel=2,
        )
