"""Putting SE where the survey says: into a graph, and by way of a graph into a module's forward.

A spot is realised in one of four ways:

- ``graph``: the module is a GraphModule; its own graph gets the SE node.
- ``append``: the value is what an ``nn.Sequential`` returns; SE becomes its last child.
- ``wrap``: the value is what a module returns; the module gets a derived class that passes it through SE.
- ``rewrite``: the value is inside a module's forward; the module gets a derived class whose forward is the generated code
  of its one-level graph with the SE node in it.
"""

from __future__ import annotations

import inspect
import linecache
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from .attention import SEAttention
from .blocks import Spot, survey
from .errors import RetrofitError
from .reading import Reading, read
from .rehearsal import Call, Ghosts, Rehearsal, base_class, rehearse_call
from .tracing import Block, Parameter, TraceFailure, expect, stars, trace

__all__ = [
    "Edit",
    "RetrofittedBlock",
    "apply_edit",
    "derive_class",
    "edits_for",
    "insert_node",
    "is_retrofitted",
    "strip",
]

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


# Graphs -----------------------------------------------------------------------------------------------------------------


def insert_node(graph: fx.Graph, node: fx.Node, name: str, users: Iterable[fx.Node] | None = None) -> fx.Node:
    """Insert ``name(node)`` behind ``node`` and give it to ``users`` (default: to all users) in ``node``'s place."""
    after = node
    if node.op == "placeholder":  # all placeholders stay in front
        after = [n for n in graph.nodes if n.op == "placeholder"][-1]
    before = list(node.users) if users is None else [u for u in node.users if u in set(users)]
    with graph.inserting_after(after):
        se = graph.call_module(name, (node,))
    for user in before:
        user.replace_input_with(node, se)
    return se


def counterpart(node: fx.Node, graph: fx.Graph, other: fx.Graph) -> fx.Node | None:
    """The node of ``other`` that does what ``node`` does in ``graph``: the same operation, as often before."""

    def key(n: fx.Node) -> tuple[str, Any]:
        return n.op, n.target

    if key(node)[0] == "output":
        return next((n for n in other.nodes if n.op == "output"), None)
    occurrence = 0
    for n in graph.nodes:
        if n is node:
            break
        occurrence += key(n) == key(node)
    found = [n for n in other.nodes if key(n) == key(node)]
    return (
        found[occurrence]
        if occurrence < len(found) and len(found) == sum(key(n) == key(node) for n in graph.nodes)
        else None
    )


# Source code --------------------------------------------------------------------------------------------------------------


def _import_line(name: str, value: Any) -> str:
    """The import that binds ``name`` to ``value`` in generated code."""
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}" if value.__name__ != name else f"import {name}"
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module is None or "." in qualname or "<" in qualname:
        raise TraceFailure(f"its forward uses {value!r}, which generated code can't import")
    found = getattr(__import__(module, fromlist=[qualname]), qualname, None)
    if found is not value:
        raise TraceFailure(f"its forward uses {value!r}, which generated code can't import")
    return f"from {module} import {qualname} as {name}" if name != qualname else f"from {module} import {qualname}"


def _body(graph: fx.Graph) -> tuple[list[str], dict[str, Any]]:
    """The generated statements of a graph and the globals that they need."""
    code = graph.python_code("self")
    lines = code.src.strip("\n").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    return [line[4:] for line in lines[start + 1 :] if line.strip()], dict(code.globals)


def _signature(module: nn.Module) -> str:
    """The parameter list of a module's forward, as source."""
    parts = ["self"]
    positional_only = star = False
    for p in inspect.signature(module.forward).parameters.values():
        if p.kind is p.POSITIONAL_ONLY:
            positional_only = True
        elif positional_only:
            parts.append("/")
            positional_only = False
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        prefix = stars(p)
        star = star or prefix == "*"
        if p.default is p.empty:
            parts.append(prefix + p.name)
        elif p.default is None or isinstance(p.default, (bool, int, float, str, tuple)):
            parts.append(f"{p.name}={p.default!r}")
        else:
            raise TraceFailure(f"the default of its forward's parameter {p.name} can't be written as source")
    if positional_only:
        parts.append("/")
    return ", ".join(parts)


def _conditions(parameters: list[Parameter], module: nn.Module) -> list[str]:
    """What must hold for a call to be like the one that was traced, as expressions."""
    defaults = {p.name: p.default for p in inspect.signature(module.forward).parameters.values()}
    conditions = []
    for p in parameters:
        if p.kind == "sequence":
            conditions.append(f"isinstance({p.name}, (list, tuple)) and len({p.name}) == {p.value}")
        elif p.kind == "tensor":
            if defaults.get(p.name) is None:
                conditions.append(f"{p.name} is not None")
            elif not isinstance(defaults[p.name], type):
                conditions.append(f"isinstance({p.name}, torch.Tensor)")
        elif p.kind == "concrete":
            identity = p.value is None or isinstance(p.value, bool)
            conditions.append(f"{p.name} is {p.value}" if identity else f"{p.name} == {p.value!r}")
    return conditions


def _passed_on(module: nn.Module) -> str:
    """The arguments with which a forward passes its call on, as source."""
    arguments = []
    for p in inspect.signature(module.forward).parameters.values():
        prefix = stars(p)
        arguments.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{prefix}{p.name}")
    return ", ".join(arguments)


@dataclass(frozen=True)
class _Way:
    """The code for one way of calling a forward."""

    conditions: tuple[str, ...]
    evaluation: tuple[str, ...]
    training: tuple[str, ...]

    def lines(self) -> list[str]:
        if self.evaluation == self.training:
            return list(self.evaluation)
        return ["if self.training:", *(f"    {line}" for line in self.training), *self.evaluation]


def _assemble(module: nn.Module, ways: list[_Way], imports: dict[str, Any]) -> str:
    """The source of a forward that takes each call the way that was traced for its like."""
    body: list[str] = []
    other = f"return self.se_another_way({_passed_on(module)})"
    if len(ways) == 1:
        if ways[0].conditions:
            body += [f"if not ({' and '.join(ways[0].conditions)}):", f"    {other}"]
        body += ways[0].lines()
    else:
        for way in ways:
            body += [f"if {' and '.join(way.conditions) or 'True'}:", *(f"    {line}" for line in way.lines())]
        body.append(other)
    header = sorted({_import_line(name, value) for name, value in imports.items()})
    return "\n".join([*header, "", "", f"def forward({_signature(module)}):", *(f"    {line}" for line in body), ""])


def _early_decisions(graph: fx.Graph, lines: list[str], module: nn.Module) -> list[str]:
    """Where nothing has been computed yet, a call that decides otherwise than the traced one can still go another way."""
    parameters = list(inspect.signature(module.forward).parameters)
    lines = list(lines)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is expect:
            index = next(i for i, line in enumerate(lines) if line.startswith(f"{node.name} = "))
            if any(f"{p} = " in line.replace(f"_{p} = ", "") for p in parameters for line in lines[:index]):
                break  # an argument has been let go
            decision, expected, _ = node.args
            lines[index : index + 1] = [
                f"if {decision} != {expected!r}:",
                f"    return self.se_another_way({_passed_on(module)})",
            ]
        elif node.op not in ("placeholder", "call_function", "call_method") or not _only_looks(node):
            break
    return lines


def _only_looks(node: fx.Node) -> bool:
    """Whether a node leaves all as it is and costs nothing: it reads a shape or computes with numbers."""
    if node.op == "placeholder":
        return True
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel", "is_contiguous", "is_floating_point")
    return (
        node.target in (getattr, len, bool)
        or getattr(node.target, "__module__", "") == "_operator"
        and not str(getattr(node.target, "__name__", "")).startswith(("i", "set"))
    )


def _rewritten(
    ghosts: Ghosts, calls: list[Call], blocks: dict[Call, Block], spots: dict[Call, list[Spot]], names: list[str]
) -> str:
    """The source of a module's forward with SE in it.

    Raises:
        TraceFailure: the forward can't be expressed as code that does the same.
    """
    module = calls[0].module
    ways: dict[tuple[str, ...], _Way] = {}
    imports: dict[str, Any] = {}
    for call in calls:
        block = blocks[call]
        conditions = tuple(_conditions(block.parameters, module))
        if conditions in ways:
            continue
        if block.flaws:
            raise TraceFailure(block.flaws[0])
        training = trace(ghosts, call, training=True)
        if training.flaws:
            raise TraceFailure(training.flaws[0])
        pairs = []
        same = _body(block.graph)[0] == _body(training.graph)[0]
        nodes = dict(zip(block.graph.nodes, training.graph.nodes, strict=True)) if same else {}
        for spot, name in zip(spots[call], names, strict=True):

            def twin(
                node: fx.Node, block: Block = block, training: Block = training, nodes: dict[fx.Node, fx.Node] = nodes
            ) -> fx.Node:
                found = nodes.get(node) or counterpart(node, block.graph, training.graph)
                if found is None:
                    raise TraceFailure(f"{node.name} has no counterpart in its forward in training mode")
                return found

            pairs.append((spot, name, twin(spot.node), None if spot.users is None else [twin(u) for u in spot.users]))
        for spot, name, node, users in pairs:
            insert_node(block.graph, spot.node, name, spot.users)
            insert_node(training.graph, node, name, users)
        (evaluation, needs), (train, train_needs) = _body(block.graph), _body(training.graph)
        evaluation = _early_decisions(block.graph, evaluation, module)
        train = _early_decisions(training.graph, train, module)
        for name, value in {**needs, **train_needs}.items():
            if name not in ("inf", "nan", "NoneType", "device", "fx_pytree", "pytree") or any(
                name in line for line in [*evaluation, *train]
            ):
                if imports.setdefault(name, value) is not value:
                    raise TraceFailure(f"generated code would need two things by the name {name}")
        ways[conditions] = _Way(conditions, tuple(evaluation), tuple(train))
    for name in ("inf", "nan"):
        if imports.pop(name, None) is not None:
            import math

            imports[name] = getattr(math, name)
    imports = {name: value for name, value in imports.items() if name not in ("inf", "nan")}
    return _assemble(module, list(ways.values()), imports)


def _wrapped(module: nn.Module, name: str) -> str:
    """The source of a forward that passes what the module returns through SE."""
    return f"def forward({_signature(module)}):\n    return self.{name}(Base.forward(self, {_passed_on(module)}))\n"


# Derived classes ------------------------------------------------------------------------------------------------------------


class RetrofittedBlock:
    """Mixed into the class of each module whose forward has SE in it.

    Instances pickle and copy: the derived class is rebuilt from its base and its source.
    """

    se_base: type[nn.Module]
    se_source: str
    se_names: tuple[str, ...]
    se_how: _Strategy
    se_kind: str
    se_placement: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        state = super().__reduce_ex__(protocol)[2]
        recipe = (cls.se_base, cls.se_source, cls.se_names, cls.se_how, cls.se_kind, cls.se_placement)
        return _revive, recipe, state

    def __setattr__(self, name: str, value: Any) -> None:
        if self.se_how == "rewrite" and self._decides(name, value):
            super().__setattr__(name, value)
            _mark_changed(self)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if self.se_how == "rewrite" and name not in self.se_names:
            _mark_changed(self)

    def se_another_way(self, *args: Any, **kwargs: Any) -> Any:
        """A call whose like was not traced yet: trace it, and go its way."""
        return _go_another_way(self, args, kwargs)

    def _decides(self, name: str, value: Any) -> bool:
        """Whether the forward may go another way once ``name`` is ``value``: the code was generated for what it was."""
        if name == "training" or name.startswith("_") or name in self.se_names:
            return False
        old = getattr(self, name, _ABSENT)
        if old is _ABSENT:
            return False
        if isinstance(old, (nn.Module, torch.Tensor)) and isinstance(value, (nn.Module, torch.Tensor)):
            return False  # called or read by its name, whatever it is
        return old is not value and (type(old) is not type(value) or bool(old != value))


_ABSENT = object()
_derived: dict[tuple[Any, ...], type[nn.Module]] = {}


def derive_class(
    base: type[nn.Module], source: str, names: tuple[str, ...], how: _Strategy, kind: str, placement: str
) -> type[nn.Module]:
    """The class derived from ``base`` whose forward is ``source``; the same for the same arguments."""
    key = (base, source, names, how, kind, placement)
    if key not in _derived:
        filename = f"<se_retrofit {base.__module__}.{base.__qualname__} {len(_derived)}>"
        # so that tracebacks and inspect.getsource show the generated code
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope: dict[str, Any] = {"torch": torch, "Base": base, "__name__": __name__}
        exec(compile(source, filename, "exec"), scope)
        forward = scope["forward"]
        forward.__qualname__ = f"SE{base.__name__}.forward"
        forward.__doc__ = base.forward.__doc__
        forward.__annotations__ = dict(getattr(base.forward, "__annotations__", {}))
        _derived[key] = _subclass(base, {"forward": forward}, key)
    return _derived[key]


def _subclass(base: type[nn.Module], members: dict[str, Any], key: tuple[Any, ...]) -> type[nn.Module]:
    _, source, names, how, kind, placement = key
    namespace = {
        **members,
        "__module__": __name__,
        "__doc__": base.__doc__,
        "se_base": base,
        "se_source": source,
        "se_names": names,
        "se_how": how,
        "se_kind": kind,
        "se_placement": placement,
    }
    metaclass: Any = type(base)
    derived: type[nn.Module] = metaclass(f"SE{base.__name__}", (RetrofittedBlock, base), namespace)
    return derived


def _revive(*recipe: Any) -> nn.Module:
    cls = derive_class(*recipe)
    return cls.__new__(cls)


# A block that is changed after its retrofit ------------------------------------------------------------------------------------

_changed: dict[type, type] = {}


def _mark_changed(block: RetrofittedBlock) -> None:
    """Give a block the class whose forward first reads the block anew."""
    cls = type(block)
    if cls not in _changed:
        key = (cls.se_base, cls.se_source, cls.se_names, cls.se_how, cls.se_kind, cls.se_placement)
        _changed[cls] = _subclass(cls.se_base, {"forward": _read_anew}, key)
        _changed[_changed[cls]] = _changed[cls]
    object.__setattr__(block, "__class__", _changed[cls])


def _read_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block one of whose attributes has changed since its code was generated."""
    _take(self, _source_of_changed(self, args, kwargs))
    return self.forward(*args, **kwargs)


def _take(block: Any, source: str) -> None:
    cls = type(block)
    derived = derive_class(cls.se_base, source, cls.se_names, "rewrite", cls.se_kind, cls.se_placement)
    object.__setattr__(block, "__class__", derived)


_sources: dict[tuple[Any, ...], str] = {}  # by class and way of calling it


def _go_another_way(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        raise RetrofitError(
            f"a {type(block).se_base.__name__} is called in a way in which it was not called before: run the model once on "
            "such an input, then compile it"
        )
    if block.__dict__.get("_se_on_another_way"):
        raise RetrofitError(
            f"a {type(block).se_base.__name__} decides in its forward by something that only a real run shows (a device, say), "
            "so its retrofitted forward can't follow it. Undo with remove_se, and leave the block out with exclude"
        )
    key = (type(block), block.training, *_likeness(args), *_likeness(sorted(kwargs.items())))
    if key not in _sources:
        _sources[key] = _source_of_changed(block, args, kwargs)
    _take(block, _sources[key])
    block.__dict__["_se_on_another_way"] = True
    try:
        return block.forward(*args, **kwargs)
    finally:
        del block.__dict__["_se_on_another_way"]


def _likeness(value: Any) -> tuple[Any, ...]:
    """What of a call's arguments its way can depend on."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_likeness, value))
    return (repr(value),)


def _source_of_changed(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    cls = type(block)
    ses = [getattr(block, name) for name in cls.se_names]
    rehearsal = rehearse_call(block, args, kwargs, prepare=strip)
    network = read(rehearsal)
    reading = next((r for r in network.readings if r.call is rehearsal.root), None)
    found = survey(network, cls.se_placement)
    spots = [spot for spot in found.spots if spot.reading is reading]
    if reading is not None and not spots and cls.se_kind == "rep-sum":
        spots = _fused_sum(reading)
    if reading is None or [spot.channels for spot in spots] != [se.channel for se in ses]:
        raise RetrofitError(
            f"a {cls.se_base.__name__} was changed after its retrofit, and SE does not fit into what it is now. Undo with "
            "remove_se, make the change, then call add_se"
        )
    try:
        return _rewritten(
            rehearsal.ghosts,
            [rehearsal.root],
            {rehearsal.root: reading.block},
            {rehearsal.root: spots},
            list(cls.se_names),
        )
    except TraceFailure as failure:
        raise RetrofitError(f"a {cls.se_base.__name__} was changed after its retrofit, and now {failure}") from failure


def _fused_sum(reading: Reading) -> list[Spot]:
    """The place of SE in a re-parameterised block, whose sum has become one conv: before the activation."""
    for node, op in reading.ops.items():
        if getattr(op, "conv", None) is not None and op.users and op.users[0].role in ("act", "pass"):
            return [Spot("", "rep-sum", reading, node, op)]
    return []


# Strategies -----------------------------------------------------------------------------------------------------------------------


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
            edits.append(_edit(rehearsal, how, group, name))
        except TraceFailure as failure:
            for target in group:
                skipped[target.spot.block] = str(failure)
    return edits, skipped


def _edit(rehearsal: Rehearsal, how: _Strategy, group: list[_Target], name: str) -> Edit:
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
    names = [name if i == 0 else f"{name}_{i + 1}" for i in range(len(spots))]
    edit = Edit(first.path, how, names, spots, [spot.overwritten for spot in spots])
    if how == "graph":
        edit.names = _graph_names(module, spots, name)
    elif how == "wrap":
        edit.source = _wrapped(module, names[0])
    elif how == "rewrite":
        blocks = {spot.reading.call: spot.reading.block for target in group for spot in [target.spot]}
        edit.source = _rewritten(rehearsal.ghosts, list(by_call), blocks, by_call, names)
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


# The surgery itself ---------------------------------------------------------------------------------------------------------------


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


def graphs_of(module: nn.Module) -> list[fx.Graph]:
    """The graphs of a GraphModule; one that keeps a graph for each mode (torchvision's) has several."""
    graphs = [g for g in (module.graph, *vars(module).values()) if isinstance(g, fx.Graph)]
    return list({id(g): g for g in graphs}.values())


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


def is_retrofitted(module: nn.Module) -> bool:
    """Whether a module is an SE module that a retrofit put in."""
    return isinstance(module, SEAttention) and module.__dict__.get("site") is not None


def strip(model: nn.Module) -> None:
    """Take all SE that a retrofit put in out again, in place."""
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            _strip_graphs(module)
        if isinstance(module, RetrofittedBlock):
            base = type(module).se_base
            object.__setattr__(module, "__class__", base)
    for module in list(model.modules()):
        for name in [n for n, child in module.named_children() if is_retrofitted(child)]:
            del module._modules[name]


def _strip_graphs(module: fx.GraphModule) -> None:
    changed = False
    for graph in graphs_of(module):
        for node in list(graph.nodes):
            if node.op == "call_module" and is_retrofitted(module.get_submodule(str(node.target))):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                changed = True
    if changed:
        module.recompile()
