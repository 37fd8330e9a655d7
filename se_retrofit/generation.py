"""From a block's graph to the source of a forward with SE in it."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .placement import Spot
from .rehearsal import Call, Ghosts
from .tracing import Block, Parameter, TraceFailure, expect, stars, trace

__all__ = ["counterpart", "insert_node", "rewritten", "wrapped"]


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


def _import_line(name: str, value: Any) -> str:
    """The import that binds ``name`` to ``value`` in generated code."""
    if isinstance(value, float):  # inf or nan, for which Python has no literal
        return f"from math import {name}"
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
        elif p.kind == "mapping":
            conditions.append(f"list({p.name}) == {p.value!r}")
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
    return node.target in (getattr, len, bool) or (
        getattr(node.target, "__module__", "") == "_operator"
        and not str(getattr(node.target, "__name__", "")).startswith(("i", "set"))
    )


def rewritten(
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
            if not any(re.search(rf"\b{name}\b", line) for line in (*evaluation, *train)):
                continue  # fx lists some that it may need
            if imports.setdefault(name, value) is not value:
                raise TraceFailure(f"generated code would need two things by the name {name}")
        ways[conditions] = _Way(conditions, tuple(evaluation), tuple(train))
    return _assemble(module, list(ways.values()), imports)


def wrapped(module: nn.Module, name: str) -> str:
    """The source of a forward that passes what the module returns through SE."""
    return f"def forward({_signature(module)}):\n    return self.{name}(Base.forward(self, {_passed_on(module)}))\n"
