"""Carrying out a saved plan again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention import Attention
from ..errors import RetrofitError
from ..plan import Plan, Site
from ..retrofit import add_se


def carried_out(
    model: nn.Module, plan: Plan, where: object, example_inputs: Any, attention: Attention | None, *, inplace: bool
) -> nn.Module:
    """Retrofit a bare network by a saved plan, which ``add_se`` checks, with the attention if it can't be saved."""
    try:
        return add_se(model, plan=plan, example_inputs=example_inputs, attention=attention or "se", inplace=inplace)
    except Warning:
        raise
    except Exception as error:  # the plan comes from a file, and the base runs on inputs chosen by it
        raise RetrofitError(f"the retrofit of {where} can't be repeated on this base: {error}") from error


def belongs_to(key: str, sites: tuple[Site, ...]) -> bool:
    return any(key == site.path or key.startswith(f"{site.path}.") for site in sites)
