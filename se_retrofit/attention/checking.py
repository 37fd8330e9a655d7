"""What a user's factory gives, tried once on a copy before it is inserted."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from ..errors import RetrofitError
from .from_identity import channels_second
from .inserted import Inserted, Slot

__all__ = ["check_made"]


def check_made(module: nn.Module, slot: Slot, name: str) -> None:
    """Run a copy of a module in train mode on random values of the slot's shape, on the CPU and in float32.

    That it draws random numbers changes nothing in eval mode, but in train mode every later draw of the network, such as that of
    its own dropout, is another one than without it: that is said, not refused.

    Raises:
        RetrofitError: it can't be run, gives another shape, changes its input, or gives values that are not finite (the
            identity would be lost: 0 * inf is NaN).

    Warns:
        UserWarning: it draws random numbers.
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
        raise RetrofitError(f"{what} must give the shape that it is given, {tuple(given.shape)}, and gives {shape}")
    if x._version != version and not isinstance(module, Inserted):
        raise RetrofitError(f"{what} changes its input in place; what it returns is to be compared with that input")
    if has_values and not found.isfinite().all():
        raise RetrofitError(
            f"{what} gives values that are not finite, for an input that is; so it can't start as an identity"
        )
    if drawn:
        warnings.warn(
            f"attention={name} draws random numbers in train mode, so the network's own draws (its dropout, say) will be others than "
            "without it; in eval mode it is an exact identity",
            stacklevel=2,
        )
