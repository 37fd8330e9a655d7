"""Putting SE where the survey says: into a graph, and by way of a graph into a module's forward.

A spot is realised in one of four ways:

- ``graph``: the module is a GraphModule; its own graph gets the SE node.
- ``append``: the value is what an ``nn.Sequential`` returns; SE becomes its last child.
- ``wrap``: the value is what a module returns; the module gets a derived class that passes it through SE.
- ``rewrite``: the value is inside a module's forward; the module gets a derived class whose forward is the generated code
  of its one-level graph with the SE node in it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import fx, nn

from .attention import SEAttention
from .derived import derive_class
from .errors import RetrofitError
from .generation import counterpart, insert_node, rewritten, wrapped
from .placement import Spot
from .reading import Reading
from .rehearsal import Call, Rehearsal, base_class
from .removal import graphs_of
from .tracing import TraceFailure

__all__ = ["Edit", "apply_edit", "edits_for"]

SE_NAME = "se_attention"

_Strategy = str  # "graph", "append", "wrap" or "rewrite"


@dataclass(eq=False)
class Edit:
    """What has to be done to one module: the SE children it gets, and how its forward comes to call them."""

    path: str
    how: _Strategy
    names: list[str] = field(default_factory=list)
    spots: list[Spot] = field(default_factory=list)
    overwrites: list[bool] = field(default_factory=list)  # whether SE may scale its input in place
    source: str = ""  # of the derived class's forward

    def se_path(self, name: str) -> str:
        """The path of an SE child in the model."""
        return f"{self.path}.{name}" if self.path else name


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and getattr(base_class(module), "forward", None) is nn.Sequential.forward


@dataclass(eq=False)
class _Target:
    """A spot with the module to change for it and how."""

    call: Call
    how: _Strategy
    spot: Spot


def _target(spot: Spot, calls: Counter[int]) -> _Target:
    """How a spot is realised.

    Raises:
        TraceFailure: it can't be.
    """
    reading = spot.reading
    module = reading.call.module
    if isinstance(module, fx.GraphModule):
        return _Target(reading.call, "graph", spot)
    child = reading.block.calls.get(spot.node)
    returned = reading.block.output is spot.node and len(spot.node.users) == 1
    if _is_sequential(module):
        return _Target(reading.call, "append", spot) if returned else _inside(child, spot, reading, calls)
    if returned and spot.users is None and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return _Target(reading.call, "wrap", spot)
    if (
        returned and spot.users is None and reading.parent is not None
    ):  # a container iterates over its children: not in it
        around = next(node for node, inner in reading.parent.children.items() if inner is reading)
        return _target(replace(spot, reading=reading.parent, node=around), calls)
    if spot.kind == "chain" and child is not None and calls[id(child.module)] == calls[id(module)]:
        return _Target(child, "append" if _is_sequential(child.module) else "wrap", spot)
    return _Target(reading.call, "rewrite", spot)


def _inside(child: Call | None, spot: Spot, reading: Reading, calls: Counter[int]) -> _Target:
    """Within an nn.Sequential: its parents index and slice it, so the element before the spot takes the SE in."""
    if child is None:
        raise TraceFailure(f"{spot.node.name} is no module, and its container can't hold SE")
    if calls[id(child.module)] != calls[id(reading.call.module)]:
        raise TraceFailure(
            f"the module {child.path}, behind which SE belongs, is used in several places; give each place a module of its own"
        )
    if isinstance(child.module, fx.GraphModule):
        raise TraceFailure(f"{child.path} is a GraphModule inside an nn.Sequential; retrofit it by itself")
    return _Target(child, "append" if _is_sequential(child.module) else "wrap", spot)


def _free_name(modules: Iterable[nn.Module], taken: Callable[[nn.Module, str], bool]) -> str:
    """One name for the SE child that is free in all modules."""
    modules = list(modules)
    name, number = SE_NAME, 1
    while any(taken(m, name) for m in modules):
        number += 1
        name = f"{SE_NAME}{number}"
    return name


def edits_for(rehearsal: Rehearsal, spots: list[Spot]) -> tuple[list[Edit], dict[str, str]]:
    """What has to be done for these spots; and the blocks for which nothing can be done, with reasons."""
    calls = Counter(id(call.module) for call in rehearsal.root.walk())
    skipped: dict[str, str] = {}
    targets: OrderedDict[tuple[int, str], list[_Target]] = OrderedDict()
    for spot in spots:
        try:
            target = _target(spot, calls)
        except TraceFailure as failure:
            skipped[spot.block] = str(failure)
            continue
        targets.setdefault((id(target.call.module), target.how), []).append(target)
    name = _free_name([group[0].call.module for group in targets.values()], hasattr)
    edits = []
    for (_, how), group in targets.items():
        try:
            edits.append(_edit(rehearsal, how, group, name, calls))
        except TraceFailure as failure:
            for target in group:
                skipped[target.spot.block] = str(failure)
    return edits, skipped


def _edit(rehearsal: Rehearsal, how: _Strategy, group: list[_Target], name: str, calls: Counter[int]) -> Edit:
    by_call: OrderedDict[Call, list[Spot]] = OrderedDict()
    for target in group:
        by_call.setdefault(target.call, []).append(target.spot)
    first, spots = next(iter(by_call.items()))
    module = first.module
    if "forward" in vars(module) and how in ("wrap", "rewrite"):
        raise TraceFailure("its forward is set on the instance, not by its class")
    for others in by_call.values():
        if [(s.channels, s.op.channel_dim) for s in others] != [(s.channels, s.op.channel_dim) for s in spots]:
            raise TraceFailure("it is called several times, with other channels each time")
    if len(by_call) != calls[id(module)]:
        raise TraceFailure("it is called several times, and not each time as a block of this kind")
    names = [name if i == 0 else f"{name}_{i + 1}" for i in range(len(spots))]
    edit = Edit(first.path, how, names, spots, [spot.overwritten for spot in spots])
    if how == "graph":
        edit.names = _graph_names(module, spots, name)
    elif how == "wrap":
        edit.source = wrapped(module, names[0])
    elif how == "rewrite":
        blocks = {spot.reading.call: spot.reading.block for target in group for spot in [target.spot]}
        edit.source = rewritten(rehearsal.ghosts, list(by_call), blocks, by_call, names)
    if edit.source:
        try:
            compile(edit.source, "<forward>", "exec")
        except SyntaxError as error:
            raise TraceFailure(f"its forward can't be written as code: {error}") from error
    return edit


def _graph_names(module: nn.Module, spots: list[Spot], name: str) -> list[str]:
    """In a GraphModule the SE of a block sits beside the block's other modules, if they still have a path of their own."""
    names: list[str] = []
    modules = dict(module.named_modules())
    for spot in spots:
        holder = spot.block
        if (
            not isinstance(modules.get(holder, module), nn.Module)
            or next(modules.get(holder, module).children(), None) is None
        ):
            holder = holder.rpartition(".")[0]  # the unit of a chain is called by its conv
        prefix = f"{holder}." if holder in modules and holder else ""
        candidate, number = prefix + name, 1
        while candidate in names or candidate in modules:
            number += 1
            candidate = f"{prefix}{name}_{number}"
        names.append(candidate)
    return names


def apply_edit(model: nn.Module, edit: Edit, ses: list[SEAttention], placement: str) -> None:
    """Carry out one edit on the real model."""
    module = model.get_submodule(edit.path)
    if edit.how == "graph":
        _edit_graphs(module, edit, ses)
        return
    for name, se in zip(edit.names, ses, strict=True):
        module.add_module(name, se)
    if edit.how != "append":
        cls = derive_class(type(module), edit.source, tuple(edit.names), edit.how, edit.spots[0].kind, placement)
        object.__setattr__(module, "__class__", cls)


def _edit_graphs(module: nn.Module, edit: Edit, ses: list[SEAttention]) -> None:
    read_graph = edit.spots[0].reading.block.graph
    todo = []
    for graph in graphs_of(module):
        for spot, name in zip(edit.spots, edit.names, strict=True):
            node = counterpart(spot.node, read_graph, graph)
            users = None if spot.users is None else [counterpart(u, read_graph, graph) for u in spot.users]
            if node is None or (users is not None and None in users):
                raise RetrofitError(f"{spot.node.name} has no counterpart in another of the GraphModule's graphs")
            todo.append((graph, node, name, users))
    for name, se in zip(edit.names, ses, strict=True):
        module.add_submodule(name, se)  # type: ignore[operator]
    for graph, node, name, users in todo:
        insert_node(graph, node, name, users)  # type: ignore[arg-type]
    module.recompile()  # type: ignore[operator]
