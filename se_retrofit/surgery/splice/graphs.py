"""SE in the graphs of a GraphModule."""

from __future__ import annotations

import hashlib
import linecache
import operator
from collections.abc import Iterator, Mapping
from functools import partial

from torch import fx, nn

from ...plan import Edit
from ..record.graph import Call, Op
from .source import SpliceError


def graphs_of(module: nn.Module) -> list[fx.Graph]:
    """Return the graphs of a GraphModule; one with a graph for each mode (torchvision's) has several."""
    graphs = [g for g in (module.graph, *vars(module).values()) if isinstance(g, fx.Graph)]
    return list({id(g): g for g in graphs}.values())


def _code_digest(module: fx.GraphModule, graph: fx.Graph) -> str:
    return _digest(module.code if graph is module.graph else graph.python_code("self").src)


def _digest(code: str) -> str:
    return hashlib.sha256(code.strip().encode()).hexdigest()[:16]


def in_graph(call: Call, op: Op, users: frozenset[Op] | None = None) -> Edit | SpliceError:
    """Return the edit at the node of a GraphModule's graph whose value an operation computes, or why there is none."""
    try:
        name, digest = _node_name(call, op)
        taking = None if users is None else tuple(sorted(_node_name(call, user)[0] for user in users))
    except SpliceError as error:
        return error
    return Edit(call.path, "graph", node=name, users=taking, digest=digest)


def _node_name(call: Call, op: Op) -> tuple[str, str]:
    """Return the node at whose line of generated code an operation happens, and the digest of that code."""
    assert isinstance(call.module, fx.GraphModule)
    if op in call.inputs:
        placeholders = [n for n in call.module.graph.nodes if n.op == "placeholder"]
        return str(placeholders[call.inputs.index(op)].name), _code_digest(call.module, call.module.graph)
    for code, lasti in call.where_of(op):
        lines = linecache.getlines(code.co_filename)
        line = list(code.co_positions())[lasti // 2][0] or 0
        # the generated "add : Tensor = x + y" assigns to a variable with the node's name
        name = "".join(lines[line - 1 : line]).partition("=")[0].partition(":")[0].strip()
        for node in [n for graph in graphs_of(call.module) for n in graph.nodes if n.name == name]:
            first = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
            # a decomposed norm returns a tuple, of which the first is its value
            return (first[0] if first and op.role == "norm" else node).name, _digest("".join(lines))
    raise SpliceError(f"the output of {op.path or op.name} is not a node of the graph of {call.path or 'the model'}")


def insert_node(graph: fx.Graph, node: fx.Node, target: str, users: list[fx.Node] | None) -> None:
    """Insert ``target(node)`` after ``node``, and replace ``node`` by it in ``users`` (None: in all users)."""
    after = node
    if node.op == "placeholder":  # placeholders must come first
        after = [n for n in graph.nodes if n.op == "placeholder"][-1]
    before = [user for user in node.users if users is None or user in users]
    with graph.inserting_after(after):
        se = graph.call_module(target, (node,))
    for user in before:
        user.replace_input_with(node, se)


Insertion = tuple[fx.Graph, fx.Node, str, list[fx.Node] | None]


def insertions_of(module: nn.Module, edits: Mapping[Edit, str]) -> Iterator[Insertion]:
    """Yield the node after which SE goes, SE's path, and the users of its output (None: all), in each of the graphs."""
    graphs = graphs_of(module) if isinstance(module, fx.GraphModule) else []
    read = {_code_digest(module, graph): graph for graph in graphs}  # type: ignore[arg-type]
    for edit, path in edits.items():
        if edit.digest not in read:
            raise SpliceError(f"the graph of {edit.holder or 'the model'} has changed")
        for graph in graphs:
            twin = partial(_counterpart, graph=read[edit.digest], other=graph)
            yield graph, twin(edit.node), path, None if edit.users is None else list(map(twin, edit.users))


def _counterpart(name: str, graph: fx.Graph, other: fx.Graph) -> fx.Node:
    """Return the node of ``other`` that corresponds to the named one in ``graph``: same operation, same occurrence."""
    node = next((n for n in graph.nodes if n.name == name), None)
    if node is None:
        raise SpliceError(f"{name} is no node of the graph")
    if other is graph:
        return node
    if node.op == "output":
        return next(n for n in other.nodes if n.op == "output")
    same = [n for n in graph.nodes if (n.op, n.target) == (node.op, node.target)]
    found = [n for n in other.nodes if (n.op, n.target) == (node.op, node.target)]
    if len(found) != len(same):
        raise SpliceError(f"{name} has no counterpart in another of the GraphModule's graphs")
    return found[same.index(node)]
