"""Carrying out a plan: build its SE modules and call them as its edits say, without any recording or recognition."""

from __future__ import annotations

import ast
import hashlib
import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from ...attention import ATTENTIONS, Inserted, Slot, built, name_of
from ...errors import RetrofitError
from ...plan import Edit, Plan, Site, noted_options
from ..arguments import Options
from ..record.copying import mode_of
from ..record.methods import unwrapped
from ..record.roles import is_sequential
from .derived import Recipe, class_before, derived_class, source_as_before
from .graphs import Insertion, insert_node, insertions_of
from .source import Splice, SpliceError, source_of
from .undo import PLAN, is_retrofitted, strip


def carry_out(model: nn.Module, plan: Plan) -> None:
    """Retrofit a model in place by a plan that fits it. If the plan contradicts itself, the model is unchanged."""
    options, modules = Options.of(plan), {}
    kept = replace(plan, options=noted_options(plan.options))  # plain data, which can be pickled
    with _disable_current_modes(), torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for site in plan.sites:
            modules[site.path] = _built(model, site, options)
            vars(modules[site.path]).update(site=site, plan=kept)
    parts = [id(part) for module in modules.values() for part in module.modules()]
    if len(set(parts)) < len(parts):
        raise RetrofitError(
            f"attention={name_of(options.attention)} gave one module to several sites; it must make a new one each time"
        )
    edits = {edit: (site.path, modules[site.path]) for site in plan.sites for edit in site.edits}
    if len(edits) < sum(len(site.edits) for site in plan.sites) or len(modules) < len(plan.sites):
        raise RetrofitError("the plan is broken: it has two sites at one place")
    try:
        apply_edits(model, edits)
    except BaseException:
        strip(model)
        raise
    vars(model)[PLAN] = kept


# Whether a plan fits --------------------------------------------------------------------------------------------------


def structure_of(modules: Mapping[str, nn.Module]) -> str:
    """Return a digest of a model without its SE: the paths and classes of its modules (given by path), the shapes of their
    parameters and buffers, and the methods that each class defines, because a method that is overridden is not called."""
    text: list[str] = []
    classes: set[type] = set()
    inside: set[int] = set()
    for path, module in modules.items():
        if is_retrofitted(module):
            inside.update(map(id, module.modules()))
        if id(module) not in inside:
            cls = class_before(module)
            tensors = (*module._parameters.items(), *module._buffers.items())
            shapes = [(name, is_lazy(t) or tuple(t.shape)) for name, t in tensors if t is not None]
            text.append(f"{path} {class_name(cls)} {shapes}")
            classes.add(cls)
    own = {c for cls in classes for c in cls.__mro__ if not c.__module__.startswith(("torch.", "builtins"))}
    text += sorted(f"{class_name(cls)} {sorted(n for n, m in vars(cls).items() if unwrapped(m))}" for cls in own)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def misfit(modules: Mapping[str, nn.Module], edits: Mapping[Edit, str]) -> str:
    """Describe the first edit that does not fit (because the source of a method has changed, say); empty if all fit.
    Modules are given by path, and edits with the path of their SE module."""
    try:
        for holder in _prepared(modules, edits):
            holder.derived()
    except SpliceError as error:
        return str(error)
    return ""


def forward_digest(cls: type) -> str:
    """Return a digest of the source of a class's forward; empty if it is not available."""
    function = unwrapped(next((vars(c)["forward"] for c in cls.__mro__ if "forward" in vars(c)), None))
    try:
        return "" if function is None else source_of(function).digest
    except SpliceError:
        return ""


# Building -------------------------------------------------------------------------------------------------------------


def block_around(model: nn.Module, path: str) -> nn.Module:
    """Return the module around an SE module that determines its device and dtype: the innermost one with parameters."""
    around = [model]
    for name in path.split(".")[:-1]:
        child = around[-1]._modules.get(name)
        if child is None:
            break
        around.append(child)
    return next((module for module in reversed(around) if next(module.parameters(), None) is not None), model)


def _built(model: nn.Module, site: Site, options: Options) -> Inserted:
    block = block_around(model, site.path)
    like = next(block.parameters(), torch.empty(0))
    dtype = like.dtype if site.dtype is None else getattr(torch, site.dtype, None)
    attention = site.attention if site.attention in ATTENTIONS else options.attention
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not isinstance(dtype, torch.dtype) or not floating or name_of(attention) != site.attention:
        raise RetrofitError(
            f"the plan is broken: at {site.path} it has the dtype {site.dtype!r} and the attention {site.attention!r}"
        )
    if site.shape and (not -len(site.shape) < site.channel_dim < 0 or site.shape[site.channel_dim] != site.channels):
        raise RetrofitError(
            f"the plan is broken: at {site.path} it has {site.channels} channels in dim {site.channel_dim} of {site.shape}"
        )
    shape = site.shape or (2, *(site.channels for _ in range(-site.channel_dim)))  # older plans don't store it
    device = torch.device("meta" if like.is_meta else "cpu")
    slot = Slot(site.channels, site.channel_dim, shape, site.kind, site.block, dtype, device, site.inplace)
    module = built(attention, vars(options), slot)
    count = sum(parameter.numel() for parameter in module.parameters())
    if count != site.parameters:
        raise RetrofitError(f"the plan is broken: {site.path} has {site.parameters} parameters, by its options {count}")
    with mode_of(like) as fake:
        if fake is not None:
            module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=like.device))
        elif like.device.type != "cpu":
            module.to(like.device)
    return module if block.training else module.eval()


# Inserting ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Holder:
    """The changes to make to one module."""

    module: nn.Module
    splices: list[Splice] = field(default_factory=list)
    returned: str = ""
    nodes: dict[Edit, str] = field(default_factory=dict)  # edits, with the path of SE in the GraphModule
    insertions: list[Insertion] = field(default_factory=list)

    def derived(self) -> type:
        """Return the module's class with SE; its own class if none of its methods calls SE."""
        if not self.splices and not self.returned:
            return type(self.module)
        splices = tuple(sorted(self.splices, key=lambda splice: (splice.method, splice.span)))
        return derived_class(Recipe(type(self.module), splices, "" if splices else self.returned))


def apply_edits(model: nn.Module, edits: Mapping[Edit, tuple[str, Inserted]]) -> None:
    """Insert SE modules into a model, given the path and the module for each edit; all of them, or none if one can't be."""
    modules = dict(model.named_modules())
    holders = _prepared(modules, {edit: path for edit, (path, _) in edits.items()})
    classes = [(holder.module, holder.derived()) for holder in holders]
    for path, se in edits.values():
        parent, _, child = path.rpartition(".")
        modules[parent]._modules[child] = se
    for holder in holders:
        for insertion in holder.insertions:
            insert_node(*insertion)
        if holder.insertions:
            holder.module.recompile()  # type: ignore[operator]
    for module, cls in classes:
        object.__setattr__(module, "__class__", cls)


def problems_of(model: nn.Module, edits: Mapping[Edit, str]) -> dict[Edit, str]:
    """Return the edits that can't be carried out together, and the reasons."""
    modules = dict(model.named_modules())
    groups: dict[str, dict[Edit, str]] = {}
    for edit, path in edits.items():
        groups.setdefault(edit.holder, {})[edit] = path
    found = {}
    for group in groups.values():
        problem = misfit(modules, group)
        if problem:
            alone = {edit: misfit(modules, {edit: path}) for edit, path in group.items()}
            found.update({edit: p for edit, p in alone.items() if p} or dict.fromkeys(group, problem))
    return found


def _prepared(modules: Mapping[str, nn.Module], edits: Mapping[Edit, str]) -> list[_Holder]:
    """Return the changes to each module, after checking that each edit fits; edits come with their SE module's path."""
    holders: dict[str, _Holder] = {}
    for edit, path in edits.items():
        parent, _, child = path.rpartition(".")
        if edit.holder not in modules or parent not in modules:
            raise SpliceError(f"there is no module {edit.holder if parent in modules else parent}")
        if not child.isidentifier() or keyword.iskeyword(child) or has_attribute(modules[parent], child):
            raise SpliceError(f"{path} can't be the path of an SE module")
        module = modules[edit.holder]
        holder = holders.setdefault(edit.holder, _Holder(module))
        if edit.form == "graph" and f"{parent}.".startswith(f"{edit.holder}." if edit.holder else ""):
            holder.nodes[edit] = path[len(edit.holder) + 1 :] if edit.holder else path
        elif parent != edit.holder or (edit.form != "append" and "forward" in vars(module)):
            raise SpliceError(f"the forward of {edit.holder or 'the model'} does not call {path}")
        elif edit.form == "splice":
            holder.splices.append(_splice(edit, module, child))
        elif edit.form == "return" and edit.digest == forward_digest(type(module)):
            holder.returned = child
        elif edit.form != "append" or not is_sequential(module):
            raise SpliceError(f"the source of {class_name(type(module))}.forward has changed")
    for holder in holders.values():
        if holder.nodes:
            holder.insertions = list(insertions_of(holder.module, holder.nodes))
    return list(holders.values())


def _splice(edit: Edit, module: nn.Module, child: str) -> Splice:
    """Return a splice with its class, looked up among the bases of the module's class, and the SE module's name."""
    owner = next((c for c in type(module).__mro__ if class_name(c) == edit.owner and edit.method in vars(c)), None)
    if owner is None:
        raise SpliceError(f"{class_name(type(module))} has no method {edit.method} of {edit.owner}")
    splice = Splice(owner, edit.method, edit.span, edit.statement, child, edit.target, edit.digest)
    source = source_as_before(splice)
    kinds = {"wrap": (ast.expr,), "after": (ast.AugAssign, ast.Expr), "before": (ast.AugAssign,)}.get(
        edit.statement, ()
    )
    place = (*(line + source.first for line in edit.span[:2]), *edit.span[2:])
    node = next((n for n in source.spans.get(place, ()) if isinstance(n, kinds)), None)
    variables = (ast.Name, ast.Attribute, ast.Subscript)  # what is inserted into the source already exists there
    inside = ast.walk(node) if node is not None and edit.statement != "wrap" else ()
    targets = [source.text(n) for n in inside if isinstance(n, variables)] or [""]
    if node is None or edit.target not in targets:
        raise SpliceError(f"{class_name(owner)}.{edit.method} has no such expression as the edit is for")
    return splice


def class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def has_attribute(module: nn.Module, name: str) -> bool:
    # not hasattr: a __getattr__ may answer to every name
    places = (vars(module), module._modules, module._parameters, module._buffers)
    return any(name in place for place in places) or any(name in vars(cls) for cls in type(module).__mro__)
