"""Repeat the surgery that a file tells of, and check that it gives the plan that was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RetrofitError
from ..plan import FOLDED, Plan, Site, Skipped
from ..retrofit import add_se, plan_of
from ..surgery.inputs import from_description
from ..surgery.undo import is_retrofitted, strip

__all__ = ["belongs_to", "check_plan", "options_again", "retrofit_again"]


def options_again(saved: dict[str, Any], inputs: Any, example_inputs: Any, where: Path) -> dict[str, Any]:
    """The arguments of ``add_se``, with inputs of the shapes that were saved unless others are given."""
    if example_inputs is None and inputs is not None:
        try:
            example_inputs = from_description(inputs)
        except ValueError as error:
            raise RetrofitError(f"{where}: the inputs can't be rebuilt: {error}; or give example_inputs") from error
    return {**saved, "example_inputs": example_inputs}


def retrofit_again(
    model: nn.Module, options: dict[str, Any], plan: dict[str, Any], where: str, *, inplace: bool
) -> nn.Module:
    """Retrofit a bare network as the saved plan says, a fold included."""
    try:
        retrofitted = add_se(model, **options, inplace=inplace)
    except Exception as error:  # the options are what a file says, and the base runs with inputs of its choice
        raise RetrofitError(f"the retrofit of {where} can't be repeated on this base: {error}") from error
    _take_out_folded(retrofitted, plan["skipped"])
    _leave_factors(retrofitted, options, plan["sites"])
    check_plan(plan_of(retrofitted).sites, plan["sites"], where)
    return retrofitted


def _take_out_folded(model: nn.Module, skipped: list[Any]) -> None:
    """Where a fold took some of a block's sites and left others, take out the same again."""
    noted = {skip.get("block") for skip in skipped if isinstance(skip, dict) and skip.get("reason") == FOLDED}
    gone = [site.path for site in plan_of(model).sites if site.path in noted]
    if gone:
        strip(model, [model.get_submodule(path) for path in gone])
        again = tuple(Skipped(path, FOLDED) for path in gone)
        for module in filter(is_retrofitted, model.modules()):
            vars(module)["plan"] = replace(vars(module)["plan"], skipped=(*vars(module)["plan"].skipped, *again))


def _leave_factors(model: nn.Module, options: dict[str, Any], sites: list[Any]) -> None:
    """Where a fold has left constant factors, put such in the place of SE."""
    saved = {site["path"] for site in sites if isinstance(site, dict) and site.get("hidden") == 0 and "path" in site}
    if options.get("gate") != "static" and saved:
        from ..folding.fold import put_factor  # imported when it is used

        for site in plan_of(model).sites:
            if site.path in saved:
                put_factor(model, site.path, torch.ones(site.channels))


def check_plan(sites: tuple[Site, ...], saved: list[Any], where: str) -> None:
    """Raise unless the sites are those that were saved, in every respect that the weights or the function depend on."""

    def essence(site: Any) -> tuple[Any, ...]:
        try:
            return tuple(site[k] for k in ("path", "after", "channels", "hidden", "channel_dim"))
        except (TypeError, KeyError) as error:
            raise RetrofitError(f"{where}: a site of the plan is broken: {site!r}") from error

    then = [essence(site) for site in saved]
    now = [essence(site) for site in Plan(sites, ()).to_dict()["sites"]]
    lost = [s for s in then if s not in now]
    new = [s for s in now if s not in then]
    if lost or new:
        raise RetrofitError(
            f"the plan of {where} no longer fits: {len(lost)} of its {len(then)} SE modules were not found in this base"
            + (f", first {lost[0]}" if lost else "")
            + (f"; {len(new)} places are new, first {new[0]}" if new else "")
            + "; is this the same base, and the version that it was saved with?"
        )


def belongs_to(key: str, sites: tuple[Site, ...]) -> bool:
    return any(key == site.path or key.startswith(f"{site.path}.") for site in sites)
