"""The plan that a file tells of, carried out again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attention import Attention
from ..errors import RetrofitError
from ..plan import Plan, Site
from ..retrofit import add_se, plan_of

__all__ = ["belongs_to", "carried_out"]


def carried_out(
    model: nn.Module, plan: Plan, where: object, example_inputs: Any, attention: Attention | None, *, inplace: bool
) -> nn.Module:
    """A bare network retrofitted by a plan that was saved, with the attention that is given, where it can't be saved."""
    try:
        retrofitted = add_se(
            model, plan=plan, example_inputs=example_inputs, attention=attention or "se", inplace=inplace
        )
    except Warning:
        raise
    except Exception as error:  # the plan is what a file says, and the base runs with inputs of its choice
        raise RetrofitError(f"the retrofit of {where} can't be repeated on this base: {error}") from error
    _check_same_sites(plan_of(retrofitted), plan, where)
    return retrofitted


def _check_same_sites(now: Plan, then: Plan, where: object) -> None:
    """Raise unless the sites are the same in every respect that the weights or the function depend on."""
    mine, theirs = (
        {
            (site.path, site.after, site.channels, site.channel_dim, site.attention, site.parameters)
            for site in plan.sites
        }
        for plan in (now, then)
    )
    if mine != theirs:
        raise RetrofitError(
            f"{where} is of a retrofit with other sites: {len(theirs - mine)} of its {len(theirs)} SE modules are not in this network, "
            f"which has {len(mine - theirs)} others; they differ at {min(mine ^ theirs)}"
        )


def belongs_to(key: str, sites: tuple[Site, ...]) -> bool:
    return any(key == site.path or key.startswith(f"{site.path}.") for site in sites)
