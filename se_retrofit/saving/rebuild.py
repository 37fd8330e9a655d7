"""The plan that a file tells of, carried out again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention import Attention
from ..errors import RetrofitError
from ..plan import Plan, Site
from ..retrofit import add_se

__all__ = ["belongs_to", "carried_out"]


def carried_out(
    model: nn.Module, plan: Plan, where: object, example_inputs: Any, attention: Attention | None, *, inplace: bool
) -> nn.Module:
    """A bare network retrofitted by a plan that was saved, with the attention that is given, where it can't be saved. That
    it has the same sites is for ``add_se`` to see, and that they have the same paths shows when the weights are loaded."""
    try:
        return add_se(model, plan=plan, example_inputs=example_inputs, attention=attention or "se", inplace=inplace)
    except Warning:
        raise
    except Exception as error:  # the plan is what a file says, and the base runs with inputs of its choice
        raise RetrofitError(f"the retrofit of {where} can't be repeated on this base: {error}") from error


def belongs_to(key: str, sites: tuple[Site, ...]) -> bool:
    return any(key == site.path or key.startswith(f"{site.path}.") for site in sites)
