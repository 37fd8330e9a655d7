"""Folding of SE whose gates have become constant into the weights around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attention import StaticFactor, check_gates
from ..errors import RetrofitError, brief, check_flag, check_positive
from ..fusion.attention import check_unfused
from ..inspection.gates import SiteGates, gates_over
from ..plan import FOLDED, Site, Skipped
from ..precision import tf32
from ..retrofit import check_removable, check_retrofitted, plan_of
from ..surgery.record.copying import check_values, copied, in_mode
from ..surgery.record.inputs import Inputs
from ..surgery.record.isolation import forked_randomness, isolated
from ..surgery.record.runs import record
from ..surgery.splice.undo import is_retrofitted, strip
from ..tables import few
from .factors import Factors, Scaling
from .measuring import Labelled, Reference, first_batches, outputs_of, relative_change
from .result import FoldedSite, FoldReport

M = TypeVar("M", bound=nn.Module)


def fold_se(
    model: M,
    data: Any,
    *,
    tolerance: float = 0.01,
    max_accuracy_loss: float = 0.005,
    max_batches: int = 8,
    keys: Sequence[str] | None = None,
    inplace: bool = False,
) -> M:
    """Fold SE modules whose gates hardly depend on the input into the network's own weights (docs/folding.md).

    A block without SE gets its original class back; a factor that can't be folded into a weight remains as a
    ``StaticFactor``. The result has an attribute ``fold_report``, with spread, effect and verdict of each site.

    Args:
        model: a network from ``add_se``.
        data: data as for ``finetune``, or any iterable of batches: tensors, tuples or lists of inputs and labels, or
            dicts of them. With integer labels, the accuracy is also taken into account.
        tolerance: largest change of the outputs, as the norm of the difference relative to that of the outputs.
        max_accuracy_loss: largest drop in accuracy, from 0 to 1 (one image is always allowed); ignored without labels.
        max_batches: maximum number of batches; the network runs over them about twice per site.
        keys: keys of inputs and labels in dicts; None for common ones, such as ``"image"`` and ``"label"``.
        inplace: change the given model instead of a copy.

    Raises:
        RetrofitError: If there is no data, or no SE with gates that can be folded (unfoldable factors, CBAM, fused SE).
        TypeError: If an argument is of the wrong type. Whatever is raised, the model is unchanged.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se, fold_se
        >>> model = add_se(timm.create_model("resnet18", num_classes=10)).eval()
        >>> folded = fold_se(model, [torch.randn(4, 3, 64, 64)])
        >>> len(folded.fold_report.folded), type(folded.layer1[0]).__name__
        (8, 'BasicBlock')
    """
    _check(model, tolerance, max_accuracy_loss, max_batches, inplace)
    sites = plan_of(model).sites
    check_gates({site.path: model.get_submodule(site.path) for site in sites}, "it can't be folded")
    batches = first_batches(model, data, keys or (), max_batches)
    work = in_mode(copied(model, independent=True), False)
    with isolated(model), forked_randomness(), torch.no_grad(), tf32(False):
        ses = {site.path: work.get_submodule(site.path) for site in sites}
        gates = gates_over(work, ses, ((batch.inputs, None) for batch in batches))
        reference = Reference(work, batches)
        effects, kept = _greedy(work, gates, reference, tolerance, max_accuracy_loss)
        todo = _absorb(work, ses, [path for path in gates if path not in kept], gates, batches)
        carry_out(work, replace(todo, scalings=[]))
        change, accuracy = reference.compare()
    result = model if inplace else copied(model)
    carry_out(result, todo)
    rows = [_row(site, gates[site.path], effects, kept, todo) for site in sites if site.path in gates]
    missed = tuple(site.path for site in sites if site.path not in gates)
    count = sum(len(batch.inputs) for batch in batches)
    report: Any = FoldReport(tuple(rows), missed, count, tolerance, change, reference.accuracy, accuracy)
    result.fold_report = report
    return result


def _row(site: Site, found: SiteGates, effects: dict[str, float], kept: dict[str, str], todo: Todo) -> FoldedSite:
    verdict = "folded" if site.path in todo.gone else "factor" if site.path in todo.factors else "kept"
    into = tuple(scaling.path for scaling in todo.gone.get(site.path, ()))
    row = (found.variation, found.between, effects[site.path], verdict, kept.get(site.path), into)
    return FoldedSite(site.path, site.block, site.channels, *row)


def _check(model: Any, tolerance: Any, max_accuracy_loss: Any, max_batches: Any, inplace: Any) -> None:
    check_retrofitted(model, "so there is nothing to fold (once all of it is folded, none is left)")
    check_removable(model, "fold_se")
    check_unfused(model, "fold_se")
    for name, value in (("tolerance", tolerance), ("max_accuracy_loss", max_accuracy_loss)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {brief(value)}")
        if not value >= 0:
            raise RetrofitError(f"{name} must be at least 0, got {value}")
    check_positive("max_batches", max_batches)
    check_flag("inplace", inplace)
    check_values(model.named_parameters())


def _greedy(
    work: nn.Module, gates: dict[str, SiteGates], reference: Reference, tolerance: float, max_accuracy_loss: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Make gates constant within the limits, starting with the least effect. Return how much constant gates at each site
    alone change the outputs, and the limits that kept sites."""
    effects, kept = {}, {}
    for path, found in gates.items():
        se = put_factor(work, path, found.mean)
        effects[path] = reference.compare()[0]
        put(work, path, se)
    for path in sorted(gates, key=lambda path: effects[path]):
        if effects[path] > tolerance:
            kept[path] = "outputs"
            continue
        se = put_factor(work, path, gates[path].mean)
        change, accuracy = reference.compare()
        fallen = 0.0 if accuracy is None or reference.accuracy is None else reference.accuracy - accuracy
        if change > tolerance:
            kept[path] = "outputs"
        elif fallen > max(max_accuracy_loss, reference.one_input):
            kept[path] = "accuracy"
        if path in kept:
            put(work, path, se)
    return effects, kept


@dataclass(frozen=True)
class Todo:
    """Changes to a network: scalings, the SE modules that are ``gone`` with theirs, ``factors`` for others."""

    scalings: list[Scaling] = field(default_factory=list)
    gone: dict[str, list[Scaling]] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)


def _absorb(
    work: nn.Module,
    ses: dict[str, nn.Module],
    constant: list[str],
    gates: dict[str, SiteGates],
    batches: list[Labelled],
) -> Todo:
    """Fold constant gates into the network, after checking that each leaves the outputs unchanged up to rounding."""
    todo = Todo()
    if constant:
        factors = Factors(work, record(work, Inputs((batches[0].inputs,))), constant)
        wanted = outputs_of(work, batches[0])
    for path in constant:
        factor = gates[path].mean
        scalings = absorb(work, factors, path, factor, batches[0], wanted)
        if scalings is None:
            todo.factors[path] = factor
        else:
            todo.scalings.extend(scalings)
            todo.gone[path] = scalings
    if not todo.gone and all(isinstance(se, StaticFactor) for se in ses.values()):
        raise RetrofitError(
            f"there is nothing left to fold: all that is left, {few(ses)}, is constant factors already, which can't be folded into "
            "any weight"
        )
    return todo


def absorb(
    work: nn.Module, factors: Factors, path: str, factor: Tensor, batch: Labelled, wanted: list[Tensor]
) -> list[Scaling] | None:
    """Fold the constant factor of an SE module into the network; if that is impossible, change nothing, return None."""
    close = torch.finfo(wanted[0].dtype).eps ** 0.5
    for find in (factors.backwards, factors.forwards):
        scalings = find(path, factor)
        if scalings is None:
            continue
        before = {s.path: work.get_parameter(s.path).clone() for s in scalings}
        se = put_factor(work, path, torch.ones_like(factor))
        for scaling in scalings:
            scaling.apply(work)
        if relative_change(outputs_of(work, batch), wanted) <= close:
            return scalings
        put(work, path, se)
        for name, value in before.items():
            work.get_parameter(name).copy_(value)
    return None


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def put_factor(model: nn.Module, path: str, factor: Tensor) -> nn.Module:
    """Replace an SE module by a constant factor for each channel, and return the SE module."""
    se: Any = model.get_submodule(path)
    like = next(se.parameters())
    new = StaticFactor(se.channel, channel_dim=se.channel_dim, inplace=se.inplace, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        new.factor.copy_(factor)
    site = replace(se.site, attention="static", parameters=se.channel)
    vars(new).update(site=site, plan=se.plan)
    put(model, path, new.train(se.training))
    return se


def carry_out(model: nn.Module, todo: Todo) -> None:
    """Make the changes to a retrofitted network. If a class can't be derived, nothing is changed."""
    modules = dict(model.named_modules())
    gone = [site for site in plan_of(model).sites if site.path in todo.gone]
    with isolated(model):
        strip(model, [modules[path] for path in todo.gone])
    for path, factor in todo.factors.items():
        put_factor(model, path, factor)
    for scaling in todo.scalings:
        scaling.apply(model)
    left = [m for m in model.modules() if is_retrofitted(m)]
    blocks = {vars(module)["site"].block for module in left}
    noted = dict.fromkeys(site.path if site.block in blocks else site.block for site in gone)
    for module in left:
        plan = vars(module)["plan"]
        sites = tuple(site for site in plan.sites if site.path not in todo.gone)
        skipped = (*plan.skipped, *(Skipped(name, FOLDED) for name in noted))
        vars(module)["plan"] = replace(plan, sites=sites, skipped=skipped)
