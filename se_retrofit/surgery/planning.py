"""Planning the retrofit of a model. Each edit is checked on a copy; the model itself is not changed."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..attention import Attention, Slot, built, name_of
from ..errors import RetrofitError, brief
from ..plan import Plan, Site
from .arguments import Options, patterns_of
from .blocks.block import Block, Found, Place
from .blocks.find import find_places, places_at
from .blocks.left import left_out
from .blocks.table import RECOGNISERS, Recogniser
from .record.facts import read
from .record.graph import Record
from .record.inputs import describe, described_inputs
from .record.isolation import isolated, without_collections
from .record.methods import METHODS
from .record.runs import Runs
from .splice.carry import block_around, misfit, structure_of
from .splice.fitting import Fitting, SurgerySite


def planned(model: nn.Module, options: Options, example_inputs: Any) -> Plan:
    METHODS.clear()
    with isolated(model) as clean, _disable_current_modes(), without_collections():
        runs = Runs.find(model, example_inputs, clean)
        found = _found(read(runs.evaluation), options)
        places = _chosen(found, options)
        trained = None if runs.training is None else read(runs.training)
        training = [] if trained is None else _found(trained, options).places
        fitting = Fitting(runs, list(places), training, found.skipped)
        sites = sorted(fitting.sites(), key=lambda site: site.place.op.index)
    if not sites:
        raise RetrofitError(_why_nothing(model, found))
    placed = [place for site in sites for place in site.places]
    skipped = left_out(runs.evaluation, trained, found, placed, everything=bool(options.auto or not options.at))
    described, structure = describe(runs.inputs, model), structure_of(dict(model.named_modules()))
    return Plan(tuple(_sites(model, sites, options)), skipped, options.noted(), described, structure)


def fitted(model: nn.Module, plan: Plan, options: Options, example_inputs: Any) -> Plan:
    """Return a plan that was made earlier, in a form that fits the model. If the model or its code has changed since,
    it is planned again, and must have the same sites; if the code of a block has changed, a warning says so."""
    plan = _with_attention(plan, options.attention)
    chosen = replace(Options.of(plan), recognisers=options.recognisers)
    if not plan.sites:
        raise RetrofitError("the plan has no sites, so there is nothing to retrofit")
    executable = all(site.edits for site in plan.sites)  # plans saved by earlier versions have no edits
    modules = dict(model.named_modules())
    changed = misfit(modules, {edit: site.path for site in plan.sites for edit in site.edits})
    if executable and not changed and plan.structure == structure_of(modules):
        return plan
    if example_inputs is None:
        try:
            example_inputs = described_inputs(plan.inputs, model)
        except ValueError as error:
            raise RetrofitError(f"the inputs of the plan can't be rebuilt: {error}; or give example_inputs") from error
    name = type(model).__name__
    try:
        again = planned(model, chosen, example_inputs)
    except RetrofitError as error:
        raise RetrofitError(f"the plan does not fit {name}, as for its site {plan.sites[0].path}: {error}") from error
    sites = tuple(_found_again(site, again, name) for site in plan.sites)
    if changed:
        warnings.warn(
            f"{changed}, so the plan of this {name} was made again; its {len(sites)} sites are there as before",
            stacklevel=3,
        )
    return replace(again, sites=sites, skipped=plan.skipped)


def _found_again(wanted: Site, again: Plan, model: str) -> Site:
    value = (wanted.after, wanted.channels, wanted.channel_dim)
    alike = [site for site in again.sites if (site.after, site.channels, site.channel_dim) == value]
    found = next((site for site in alike if site.path == wanted.path), None)
    found = found or next((site for site in alike if site.block == wanted.block), None)
    same = found is not None and (wanted.attention != found.attention or wanted.parameters == found.parameters)
    if found is None or not same:
        reason = next((f": {skip.reason}" for skip in again.skipped if skip.block == wanted.block), "")
        raise RetrofitError(
            f"the plan does not fit {model}, which has no place for its site {wanted.path} (after {wanted.after}, {wanted.channels} "
            f"channels, {wanted.parameters} parameters){reason}. Make a plan of this model with plan_se(...), or take the site "
            "out of the plan"
        )
    return replace(found, attention=wanted.attention, parameters=wanted.parameters)


def _with_attention(plan: Plan, given: Attention) -> Plan:
    """Return an earlier plan; if it was made with a class or factory and then saved, with the one given again."""
    noted: Any = plan.options.get("attention", "se")
    if not isinstance(noted, dict):
        if given not in ("se", noted):
            raise RetrofitError(f"the plan brings its own attention, {name_of(noted)}; leave attention out")
        return plan
    saved = noted.get("callable")
    if isinstance(given, str):
        raise RetrofitError(
            f"the plan was made with a class or factory, {saved}, which is not saved; give it again: attention=..."
        )
    sites = tuple(replace(s, attention=name_of(given)) if s.attention == saved else s for s in plan.sites)
    return replace(plan, sites=sites, options={**plan.options, "attention": given})


# Which places ---------------------------------------------------------------------------------------------------------


def _found(record: Record, options: Options) -> Found:
    """Find the places of blocks, those that ``at`` names, or both."""
    patterns = patterns_of("at", options.at)
    named, found = places_at(record, patterns) if patterns else Found(), Found()
    if options.auto or not patterns:
        table = [*(Recogniser(partial(_asked, find)) for find in options.recognisers), *RECOGNISERS]
        found = find_places(record, options.placement, table)
    taken = {place.op for place in named.places}
    places = [*named.places, *(place for place in found.places if place.op not in taken)]
    found.places = sorted(places, key=lambda place: place.op.index)
    found.skipped = named.skipped | found.skipped
    return found


def _asked(find: Any, record: Record) -> Iterator[Block]:
    """Yield the blocks from a recogniser of the user's, which may raise an error or yield something else."""
    try:
        found = list(find(record))
    except Exception as error:
        raise RetrofitError(f"the recogniser {name_of(find)} raised {type(error).__name__}: {error}") from error
    for block in found:
        if not isinstance(block, Block):
            raise RetrofitError(f"the recogniser {name_of(find)} must yield Block objects, got {brief(block)}")
        yield block


def _chosen(found: Found, options: Options) -> list[Place]:
    """Return the places that ``include`` and ``exclude`` select, which are patterns of block paths."""
    included, excluded = patterns_of("include", options.include), patterns_of("exclude", options.exclude)
    blocks = list(dict.fromkeys(place.block for place in found.places if not place.named))
    if found.places and not blocks and (included or excluded):
        raise RetrofitError(
            "include and exclude choose among the blocks found, and with at alone there are none: give at other patterns, or auto=True"
        )
    for pattern in included + excluded if blocks else ():
        if not fnmatch.filter(blocks, pattern):
            raise RetrofitError(
                f"the pattern {pattern!r} matches none of the {len(blocks)} blocks found, which are "
                f"{', '.join(blocks[:4])}{', ...' if len(blocks) > 4 else ''}"
            )
    reasons = {}
    for place in found.places:
        asked = any(fnmatch.fnmatch(place.block, p) for p in included)
        if place.named:
            continue
        if not asked and (place.aside or included):
            reasons[place] = place.aside or "not included"
        elif any(fnmatch.fnmatch(place.block, p) for p in excluded):
            reasons[place] = "excluded"
    chosen = [place for place in found.places if place not in reasons]
    if not chosen and any(reason != place.aside for place, reason in reasons.items()):
        raise RetrofitError("include and exclude together leave no block to retrofit")
    kept = {place.block for place in chosen}
    for place, reason in reasons.items():  # a chain in a block that keeps its SE is named after its layers
        name = min(place.layers, default=place.block) if place.block in kept else place.block
        found.leave(name, reason, place.region)
    return chosen


def _why_nothing(model: nn.Module, found: Found) -> str:
    name = type(model).__name__
    beside = [place for place in found.places if place.aside]
    nameable = list(dict.fromkeys(place.block for place in beside))
    asides = {place.aside for place in beside}
    left = {block: why for block, why in found.skipped.items() if why not in asides}
    if found.attended and len(beside) == len(found.places):
        problem = f"channel attention already, in all of its convolutional blocks ({found.attended}), so there is nothing to retrofit"
    elif left:
        # that a placement does not apply is the least informative reason
        block, reason = max(left.items(), key=lambda item: not item[1].startswith("placement "))
        problem = f"no block that can be retrofitted ({len(left)} skipped; {block or 'the model'}: {reason})"
    else:
        problem = (
            "no convolutional blocks: no residual, dense, inverted or multi-branch unit with a convolution over space, and no "
            "plain chain of convolutions, so there is nothing to retrofit"
        )
    hint = f"; beside them, include may name {', '.join(nameable[:3])}" if nameable else ""
    return f"{name} has {problem}{hint}{', ...' if len(nameable) > 3 else ''}"


# As data --------------------------------------------------------------------------------------------------------------


def _sites(model: nn.Module, found: list[SurgerySite], options: Options) -> Iterable[Site]:
    """Yield the sites as data, each with the number of parameters of a module built for it."""
    settings, name = vars(options), name_of(options.attention)
    counts: dict[Any, int] = {}  # for named attentions, by what their parameters depend on
    for site in found:
        place, op = site.place, site.place.op
        assert op.channel_dim is not None
        shape = tuple(int(size) for size in op.shape)
        meta = torch.device("meta")
        slot = Slot(place.channels, op.channel_dim, shape, place.kind, place.block, op.dtype, meta, place.overwritten)
        key = site.path if name != options.attention else (slot.channels, slot.dims)
        if key not in counts:
            with _disable_current_modes(), torch.random.fork_rng(devices=[]):
                module = built(options.attention, settings, slot)
            counts[key] = sum(parameter.numel() for parameter in module.parameters())
        like = next(block_around(model, site.path).parameters(), None)
        own = like is not None and like.dtype == op.dtype
        yield Site(
            site.path, place.block, place.kind, _after(place), place.channels, counts[key], op.channel_dim, name, shape,
            place.overwritten, None if own else str(op.dtype).removeprefix("torch."), tuple(site.edits),
        )  # fmt: skip


def _after(place: Place) -> str:
    """Return what computes the value that SE scales: the path of a module in the block, or the name of an operation."""
    call, op = place.call, place.op
    while op.path is None and op.role in ("shape", "pass") and len(op.data) == 1 and call.shows(op.data[0]):
        op = op.data[0]
    child = None if op.call is call else next((c for c in call.children if op in c.outputs), None)
    path = op.path if child is None else child.path
    if path is None or (op.call is not call and child is None):
        return op.name
    return path.removeprefix(f"{call.path}.")  # a module that blocks share has its path in one of them
