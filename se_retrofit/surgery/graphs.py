"""SE in the graphs of a GraphModule."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ..attention import Inserted
from .record import Call, Op
from .splice import SpliceError

__all__ = ["graph_place", "graphs_of", "insert_into_graphs", "insert_node"]


def graphs_of(module: nn.Module) -> list[fx.Graph]:
    """The graphs of a GraphModule; one that keeps a graph for each mode (torchvision's) has several."""
    graphs = [g for g in (module.graph, *vars(module).values()) if isinstance(g, fx.Graph)]
    return list({id(g): g for g in graphs}.values())


def graph_place(call: Call, op: Op, users: frozenset[Op] | None) -> tuple[str, frozenset[str] | None]:
    """The node of a GraphModule's graph whose value an operation makes, and those of the operations that take it, by name.

    Raises:
        SpliceError: it is no node's value.
    """
    name = _node_name(call, op)
    if users is None:
        return name, None
    return name, frozenset(_node_name(call, user) for user in users)


def _node_name(call: Call, op: Op) -> str:
    """The node at whose line of generated code an operation happens."""
    graph: fx.Graph = call.module.graph  # type: ignore[assignment]
    if op in call.inputs:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        return str(placeholders[call.inputs.index(op)].name)
    child = None if op.call is call else call.child_with(op)
    where = op.where if child is None else child.where
    for code, lasti in where:
        line = list(code.co_positions())[lasti // 2][0]
        name = _assigned(linecache.getlines(code.co_filename), line)
        if name is not None and any(n.name == name for n in graph.nodes):
            return name
    raise SpliceError(f"the output of {op.path or op.name} is not a node of the graph of {call.path or 'the model'}")


def _assigned(lines: list[str], line: int | None) -> str | None:
    """The variable that a line of generated code assigns to."""
    if line is None or not 0 < line <= len(lines):
        return None
    try:
        statement = ast.parse(lines[line - 1].strip()).body[0]
    except (SyntaxError, IndexError):
        return None
    if isinstance(statement, ast.Return):
        return None
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def insert_node(graph: fx.Graph, node: fx.Node, target: str, users: Iterable[fx.Node] | None = None) -> fx.Node:
    """Insert ``target(node)`` behind ``node`` and give it to ``users`` (default: to all users) in ``node``'s place."""
    after = node
    if node.op == "placeholder":  # all placeholders stay in front
        after = [n for n in graph.nodes if n.op == "placeholder"][-1]
    before = list(node.users) if users is None else [u for u in node.users if u in set(users)]
    with graph.inserting_after(after):
        se = graph.call_module(target, (node,))
    for user in before:
        user.replace_input_with(node, se)
    return se


def insert_into_graphs(module: Any, todo: list[tuple[Any, str, Inserted]]) -> None:
    """Insert SE modules into all graphs of a GraphModule: for each the node and its users by name, the path, the module.

    Raises:
        SpliceError: one of the graphs has no node of the kind. Nothing has been changed then.
    """
    read = module.graph
    insertions = []
    for graph in graphs_of(module):
        for (name, users), path, _ in todo:
            node = _counterpart(name, read, graph)
            insertions.append(
                (graph, node, path, None if users is None else [_counterpart(u, read, graph) for u in users])
            )
    for _, path, se in todo:
        module.add_submodule(path, se)
    for graph, node, path, users in insertions:
        insert_node(graph, node, path, users)
    module.recompile()


def _counterpart(name: str, graph: fx.Graph, other: fx.Graph) -> fx.Node:
    """The node of ``other`` that does what the named one does in ``graph``: the same operation, as often before."""
    node = next(n for n in graph.nodes if n.name == name)
    if other is graph:
        return node
    if node.op == "output":
        return next(n for n in other.nodes if n.op == "output")
    same = [n for n in graph.nodes if (n.op, n.target) == (node.op, node.target)]
    found = [n for n in other.nodes if (n.op, n.target) == (node.op, node.target)]
    if len(found) != len(same):
        raise SpliceError(f"{name} has no counterpart in another of the GraphModule's graphs")
    return found[same.index(node)]
