"""The table of attentions by name, and the construction of the module for a place from a name, a class or a factory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import RetrofitError, brief
from .cbam import CBAM
from .eca import ECA
from .from_identity import FromIdentity, check_made
from .inserted import Inserted, Slot
from .se import SEAttention
from .static import StaticFactor

Attention = str | Callable[..., nn.Module]


# A row is a function of the slot and of the retrofit's options: reduction, gate, bias, min_hidden. It returns a module
# on the slot's device that is an exact identity.
ATTENTIONS: dict[str, Callable[[Slot, Mapping[str, Any]], Inserted]] = {
    "se": lambda slot, options: SEAttention(slot.channels, gate=options["gate"], **_bottleneck(options), **slot.where),
    "eca": lambda slot, options: ECA(slot.channels, **slot.where),
    "cbam": lambda slot, options: CBAM(slot.channels, dims=slot.dims, **_bottleneck(options), **slot.where),
    "static": lambda slot, options: StaticFactor(slot.channels, **slot.where),
}


def _bottleneck(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("reduction", "bias", "min_hidden")}


def check_attention(attention: Any) -> None:
    """Raise an error unless the attention is a name in the table, a class or a factory."""
    if isinstance(attention, str):
        if attention not in ATTENTIONS:
            raise RetrofitError(
                f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, a class or a factory, got {brief(attention)}"
            )
    elif isinstance(attention, nn.Module):
        raise TypeError(
            f"attention must make a new module for each place, got one {type(attention).__name__}; give its class, or a "
            "factory: lambda slot: ..."
        )
    elif not callable(attention):
        raise TypeError(f"attention must be a name, a class or a factory, got {brief(attention)}")


def name_of(attention: Attention) -> str:
    """Return the name in the table, or the qualified name of a class or factory."""
    if isinstance(attention, str):
        return attention
    named: Any = attention.func if isinstance(attention, functools.partial) else attention
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"


def built(attention: Attention, options: Mapping[str, Any], slot: Slot) -> Inserted:
    """Build the module for a place, as an exact identity and with the slot's dtype. Its values are drawn from torch's global
    generator; if the slot's device is meta, it has none, if possible."""
    if isinstance(attention, str):
        return ATTENTIONS[attention](slot, options)
    try:
        module = _made(attention, slot)
    except RetrofitError:
        if slot.device.type != "meta":
            raise
        module = _made(attention, replace(slot, device=torch.device("cpu")))  # a constructor may need values
    if isinstance(module, Inserted) and module.site is not None:
        raise RetrofitError(
            f"attention={name_of(attention)} gave another site's module; it must make a new one each time"
        )
    check_made(module, slot, name_of(attention))
    if not isinstance(module, Inserted):
        alpha = next((p.device for p in module.parameters()), None)
        module = FromIdentity(module, slot.channels, channel_dim=slot.channel_dim, device=alpha)
    return module.to(slot.dtype)


def _made(attention: Callable[..., nn.Module], slot: Slot) -> nn.Module:
    cls = attention.func if isinstance(attention, functools.partial) else attention
    own = isinstance(cls, type) and issubclass(cls, Inserted)
    try:
        with slot.device:
            module = attention(
                slot.channels if isinstance(cls, type) else slot, **({"channel_dim": slot.channel_dim} if own else {})
            )
    except Exception as error:
        raise RetrofitError(
            f"attention={name_of(attention)} can't be built for {slot.channels} channels, in block {slot.block or '(model)'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise RetrofitError(f"attention={name_of(attention)} must give an nn.Module, got {brief(module)}")
    return module
