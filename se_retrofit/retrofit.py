"""Three functions that belong together, ``add_se``, ``remove_se`` and ``has_se``; and ``plan_se``, which shows what
``add_se`` would do."""

from __future__ import annotations

import fnmatch
import warnings
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .attention import hidden_width, parameter_count
from .errors import RetrofitError, check_module
from .plan import Plan, Site, Skipped
from .surgery.arguments import Options, Patterns, check_model, patterns_of
from .surgery.carry import block_around, carry_out, misfit, structure_of
from .surgery.copying import copied
from .surgery.derived import RetrofittedBlock
from .surgery.edits import se_paths
from .surgery.inputs import describe, from_description
from .surgery.placement import Place
from .surgery.planning import SurgerySite, plan_surgery
from .surgery.undo import is_retrofitted, lost_sites, strip

__all__ = ["InsertSE", "add_se", "has_se", "plan_of", "plan_se", "remove_se"]

M = TypeVar("M", bound=nn.Module)


def add_se(
    model: M,
    reduction: int = 8,
    *,
    placement: str = "auto",
    gate: str = "identity",
    bias: bool = False,
    min_hidden: int = 4,
    include: Patterns = None,
    exclude: Patterns = None,
    example_inputs: Any = None,
    plan: Plan | None = None,
    inplace: bool = False,
) -> M:
    """Put Squeeze-and-Excitation into each convolutional block of a network, where the SE paper puts it.

    The result is of the same class, has the same methods, parameters and checkpoint keys (plus those of the SE modules),
    and, with the default gate, gives the same outputs bit for bit until it is trained.

    Args:
        model: a network from torchvision, timm or your own code. It is not changed unless ``inplace``.
        reduction: the excitation's bottleneck has ``channels // reduction`` units (the paper's r).
        placement: ``"auto"``, or for residual units one of the paper's others: ``"standard"``, ``"pre"``, ``"post"``,
            ``"identity"``, ``"3x3"`` (section 6.4, figure 5).
        gate: ``"identity"``, ``2 * sigmoid`` that starts at exactly 1; or ``"sigmoid"``, the paper's, which starts at
            about 1/2 and so is for training from scratch and for loading the weights of a native SE network; or
            ``"static"``, a learned factor for each channel that starts at exactly 1, as a control.
        bias: whether the excitation's layers have biases.
        min_hidden: minimum number of units in the bottleneck.
        include, exclude: one or several patterns of block paths (``"layer4.*"``): retrofit only matching blocks, or all others.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, ``(args, kwargs)``, or any
            other object that the model takes. Only shapes and dtypes are read, unless the forward itself looks at values.
            Without it the model's config, sizes in its own attributes and then usual sizes are tried.
        plan: a plan from ``plan_se``, for this model or one built alike, which is carried out instead of the options above.
            Sites may have been taken out of it (``dataclasses.replace(plan, sites=...)``). Where the model has other modules,
            or the source of a method has changed, the plan is made again and must have the same sites.
        inplace: change the given model; its parameters stay the same objects, so an optimizer stays bound to them.

    Returns:
        The retrofitted network: a deep copy, or ``model`` itself if ``inplace``.

    Raises:
        RetrofitError: nothing can be retrofitted, an option is invalid, or the plan does not fit; the model is unchanged.
        TypeError: an argument is of the wrong type; the model is unchanged.

    Warns:
        UserWarning: the source of a method has changed since the plan was made, and its sites are there all the same.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> model = add_se(timm.create_model("resnet18"), reduction=16)
        >>> model.layer1[0].se_attention
        SEAttention(
          64, hidden=4, gate=identity, channel_dim=-3
          (fc): Sequential(
            (0): Linear(in_features=64, out_features=4, bias=False)
            (1): ReLU(inplace=True)
            (2): Linear(in_features=4, out_features=64, bias=False)
            (3): TwiceSigmoid()
          )
        )
    """
    options = Options(reduction, placement, gate, bias, min_hidden, include, exclude)
    if plan is None:
        plan = _planned(model, options, example_inputs)
    else:
        plan = _fitted(model, plan, options, example_inputs)
    target = model if inplace else copied(model)
    carry_out(target, plan)
    return target


def plan_se(
    model: nn.Module,
    reduction: int = 8,
    *,
    placement: str = "auto",
    gate: str = "identity",
    bias: bool = False,
    min_hidden: int = 4,
    include: Patterns = None,
    exclude: Patterns = None,
    example_inputs: Any = None,
) -> Plan:
    """What ``add_se`` would do with the same arguments, without doing it.

    Args, raises: as for ``add_se``.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> plan = plan_se(timm.create_model("resnet18"))
        >>> len(plan.sites), plan.sites[0].path, plan.sites[0].after
        (8, 'layer1.0.se_attention', 'bn2')
    """
    return _planned(model, Options(reduction, placement, gate, bias, min_hidden, include, exclude), example_inputs)


def remove_se(model: M, *, inplace: bool = False) -> M:
    """Undo ``add_se``: the original structure, class by class and key by key. What the SE modules learned is lost.

    Args:
        model: a retrofitted network.
        inplace: change the given model instead of a copy.

    Raises:
        RetrofitError: there is no retrofitted SE in the model, or the classes of its blocks were changed since.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, remove_se
        >>> model = timm.create_model("resnet18")
        >>> list(remove_se(add_se(model)).state_dict()) == list(model.state_dict())
        True
    """
    check_module(model)
    if not has_se(model):
        raise RetrofitError(f"{type(model).__name__} has no SE inserted by add_se, so there is nothing to remove")
    check_removable(model, "remove_se")
    target = model if inplace else copied(model)
    strip(target)
    return target


def check_removable(model: nn.Module, caller: str) -> None:
    """Raise if something else has derived classes from retrofitted blocks since."""
    for path, module in model.named_modules():
        if isinstance(module, RetrofittedBlock) and "se_recipe" not in vars(type(module)):
            raise RetrofitError(
                f"the class of block {path} was changed after the retrofit, to {type(module).__name__} (by "
                f"torch.nn.utils.parametrize or FSDP, say); undo that first, then call {caller}"
            )


def has_se(model: nn.Module) -> bool:
    """Whether ``add_se`` has put SE into this model (a network's own, native SE does not count).

    Warns:
        UserWarning: modules that contained SE were replaced after the retrofit, so their SE is gone; the warning names the sites.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, has_se
        >>> model = timm.create_model("resnet18")
        >>> has_se(model), has_se(add_se(model))
        (False, True)
    """
    warn_of_lost_sites(model)
    return any(map(is_retrofitted, model.modules()))


def warn_of_lost_sites(model: nn.Module) -> None:
    """Warn where modules with SE in them were replaced after the retrofit (VGG's ReLU by a GELU, say)."""
    lost = lost_sites(model)
    if lost:
        names = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        warnings.warn(
            f"{len(lost)} SE modules that add_se put into {type(model).__name__} are gone ({names}): the modules that held "
            "them were replaced after the retrofit. Replace modules first, then call add_se",
            stacklevel=3,
        )


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was retrofitted.

    Raises:
        RetrofitError: the model is not retrofitted.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, plan_of
        >>> plan_of(add_se(timm.create_model("resnet18"), reduction=16)).options["reduction"]
        16
    """
    ses = [(path, module) for path, module in model.named_modules() if is_retrofitted(module)]
    if not ses:
        raise RetrofitError(f"{type(model).__name__} has no SE inserted by add_se")
    plan: Plan = ses[0][1].plan
    sites = tuple(_moved(module.site, path) for path, module in ses)
    return replace(plan, sites=sites, structure=structure_of(model))


def _moved(site: Site, path: str) -> Site:
    """A site of a network that may be a part of another now. In a part of the network itself, its edits have no meaning."""
    outer = path.removesuffix(site.path)
    edits = [replace(edit, holder=f"{outer}{edit.holder}".rstrip(".")) for edit in site.edits]
    return replace(site, path=path, edits=tuple(edits) if outer + site.path == path else ())


class InsertSE(PassBase):
    """``add_se`` as a torch.fx pass: inserts SE into the graph of one GraphModule, in place.

    Args: as for ``add_se``, except ``inplace``.

    Example:
        >>> import torch, torchvision
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> from se_retrofit import InsertSE
        >>> traced = torch.fx.symbolic_trace(torchvision.models.resnet18())
        >>> result = PassManager(passes=[InsertSE(reduction=16)])(traced)
        >>> result.modified, sum(node.name.endswith("se_attention") for node in result.graph_module.graph.nodes)
        (True, 8)
    """

    def __init__(self, reduction: int = 8, **options: Any) -> None:
        super().__init__()
        self.reduction = reduction
        self.options = options

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        if not isinstance(graph_module, torch.fx.GraphModule):
            raise TypeError(
                f"InsertSE takes a GraphModule, got {type(graph_module).__name__}; for other modules call add_se"
            )
        return PassResult(add_se(graph_module, self.reduction, **self.options, inplace=True), True)


# Behind them ------------------------------------------------------------------


def _planned(model: nn.Module, options: Options, example_inputs: Any) -> Plan:
    """Find out all that is to be done; touch nothing."""
    check_model(model)
    options.check()
    included, excluded = patterns_of("include", options.include), patterns_of("exclude", options.exclude)
    nothing: list[str] = []

    def choose(places: list[Place], skipped: dict[str, str]) -> list[Place]:
        if not places:
            nothing.append("")
            return places
        return _chosen(places, skipped, included, excluded)

    surgery = plan_surgery(model, options.placement, example_inputs, choose)
    if not surgery.sites:
        raise RetrofitError(_why_nothing(model, surgery.attended if nothing else 0, surgery.skipped))
    in_order = sorted(surgery.sites, key=lambda site: site.place.op.index)
    sites = tuple(_site(model, site, options) for site in in_order)
    called: dict[str, int] = {}
    for index, call in enumerate(surgery.record.calls):
        called.setdefault(call.path, index)
    left = sorted(surgery.skipped.items(), key=lambda item: called.get(item[0], len(called)))
    skipped = tuple(Skipped(block, reason) for block, reason in left)
    noted = asdict(replace(options, include=included or None, exclude=excluded or None))
    return Plan(sites, skipped, noted, describe(surgery.inputs), structure_of(model))


def _fitted(model: nn.Module, plan: Any, options: Options, example_inputs: Any) -> Plan:
    """A plan that was made before; where the model is another one by now, or its code has changed, the plan made again, if that
    has the same sites."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be what plan_se returns, got {type(plan).__name__}")
    if options != Options():
        raise RetrofitError("a plan brings its own options; give plan= alone, or make a new plan with plan_se(...)")
    check_model(model)
    chosen = Options.of(plan)
    if not plan.sites:
        raise RetrofitError("the plan has no sites, so there is nothing to retrofit")
    executable = all(site.edits for site in plan.sites)  # one that was saved by an earlier version has no edits
    changed = misfit(model, plan) if executable else ""
    if executable and not changed and plan.structure == structure_of(model):
        return plan
    if example_inputs is None and plan.inputs is not None:
        try:
            example_inputs = from_description(plan.inputs)
        except ValueError as error:
            raise RetrofitError(f"the inputs of the plan can't be rebuilt: {error}; or give example_inputs") from error
    name = type(model).__name__
    try:
        again = _planned(model, chosen, example_inputs)
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
    """A site of an earlier plan in one that was made now.

    Raises:
        RetrofitError: there is none, or its SE would be another.
    """
    value = (wanted.after, wanted.channels, wanted.channel_dim)
    alike = [site for site in again.sites if (site.after, site.channels, site.channel_dim) == value]
    found = next((site for site in alike if site.path == wanted.path), None)
    found = found or next((site for site in alike if site.block == wanted.block), None)
    if found is None or wanted.hidden not in (0, found.hidden):
        reason = next((f": {skip.reason}" for skip in again.skipped if skip.block == wanted.block), "")
        raise RetrofitError(
            f"the plan does not fit {model}, which has no place for its site {wanted.path} (after {wanted.after}, {wanted.channels} "
            f"channels, hidden={wanted.hidden}){reason}. Make a plan of this model with plan_se(...), or take the site out of the plan"
        )
    return replace(found, hidden=wanted.hidden, parameters=wanted.parameters)


def _chosen(places: list[Place], skipped: dict[str, str], included: list[str], excluded: list[str]) -> list[Place]:
    """The places that ``include`` and ``exclude`` let through. A pattern is over the paths of blocks, and of what in a plain chain
    is less than a block: its convolutions; where it matches none of these, over those of SE modules."""
    names = {place: [place.block, *place.names] for place in places}
    blocks = list(dict.fromkeys(place.block for place in places))
    for pattern in included + excluded:
        if not any(fnmatch.filter(of_place, pattern) for of_place in names.values()):
            paths = se_paths(places)
            matched = [place for place in places if fnmatch.fnmatchcase(paths.get(place, ""), pattern)]
            if not matched:
                raise RetrofitError(
                    f"the pattern {pattern!r} matches none of the {len(blocks)} blocks found, which are "
                    f"{', '.join(blocks[:4])}{', ...' if len(blocks) > 4 else ''}"
                )
            for place in matched:
                names[place].append(paths[place])
    chosen = []
    reasons: dict[Place, str] = {}
    for place in places:
        if included and not any(fnmatch.filter(names[place], p) for p in included):
            reasons[place] = "not included"
        elif any(fnmatch.filter(names[place], p) for p in excluded):
            reasons[place] = "excluded"
        else:
            chosen.append(place)
    if not chosen:
        raise RetrofitError("include and exclude together leave no block to retrofit")
    kept = {place.block for place in chosen}
    for place, reason in reasons.items():  # of a block that keeps others, what is left out is named on its own
        skipped[place.block if place.block not in kept else se_paths(places).get(place, place.block)] = reason
    return chosen


def _site(model: nn.Module, site: SurgerySite, options: Options) -> Site:
    place, op, gate = site.place, site.place.op, options.gate
    hidden = 0 if gate == "static" else hidden_width(place.channels, options.reduction, options.min_hidden)
    assert op.channel_dim is not None
    like = next(block_around(model, site.path).parameters(), None)
    own = like is not None and like.dtype == op.dtype
    return Site(
        site.path, place.block, place.kind, _after(place), place.channels, hidden,
        parameter_count(place.channels, hidden, gate, options.bias), op.channel_dim, tuple(op.shape), place.overwritten,
        None if own else str(op.dtype).removeprefix("torch."), tuple(site.edits),
    )  # fmt: skip


def _after(place: Place) -> str:
    """What makes the value that SE scales: a module's path in the block, or else an operation's name."""
    call, op = place.call, place.op
    while op.path is None and op.role in ("shape", "pass") and len(op.data) == 1 and call.shows(op.data[0]):
        op = op.data[0]
    child = None if op.call is call else next((c for c in call.children if op in c.outputs), None)
    path = op.path if child is None else child.path
    if path is None or (op.call is not call and child is None):
        return op.name
    return path[len(call.path) + 1 :] if call.path else path


def _why_nothing(model: nn.Module, attended: int, skipped: dict[str, str]) -> str:
    name = type(model).__name__
    if attended:
        return f"{name} has channel attention already, in all of its convolutional blocks ({attended}), so there is nothing to retrofit"
    if skipped:
        block, reason = next(iter(skipped.items()))
        return f"{name} has no block that can be retrofitted ({len(skipped)} skipped; {block or 'the model'}: {reason})"
    return (
        f"{name} has no convolutional blocks: no residual, dense, inverted or multi-branch unit with a convolution over space, "
        "and no plain chain of convolutions, so there is nothing to retrofit"
    )
