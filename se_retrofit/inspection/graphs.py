"""The graph of each retrofitted block, as a part of the ``torch.fx.Graph`` of its network's record.

A block's call is shown as it was recorded: its own operations and the modules that it calls. Containers without a forward of
their own (``nn.Sequential``) and modules that hold an SE module are expanded, so that SE is shown among its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Container

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from ..plan import Plan, Site
from ..surgery.record.graph import Call, Op, Record
from ..surgery.record.roles import is_sequential
from ..surgery.splice.undo import is_retrofitted
from .blocks import BlockGraph, BlockPair, class_name


def blocks_of(model: nn.Module, plan: Plan, record: Record) -> list[BlockPair]:
    """Return the blocks of a retrofitted model that were called when it was recorded, in the order of the plan."""
    sites: dict[str, list[Site]] = {}
    for site in plan.sites:
        sites.setdefault(site.block, []).append(site)
    opened = {
        call.path
        for call in record.calls
        if is_sequential(call.module) or any(map(is_retrofitted, call.module.modules()))
    }
    called = {op.path: op.call for op in reversed(record.ops)}
    calls: dict[str, list[Call]] = {}
    for call in record.calls:
        calls.setdefault(call.path, []).append(call)
    modules = dict(model.named_modules())
    pairs = []
    for path, own in sites.items():
        around = _call_around(path, called.get(own[0].path))
        if around is None:
            continue
        cls = class_name(_unit(calls[path][0]) if path in calls else modules.get(path, model))
        whole = around if around.path == path else None
        steps = steps_of(record, around, opened)
        if whole is None:
            steps = _part(steps, path, own)
        graph, number = graph_of(record, steps, whole), len(calls[around.path])
        pairs.append(BlockPair(path, own[0].kind, cls, own, model, graph, _span(steps), number))
    return pairs


Steps = list[Op | Call]


def _call_around(path: str, call: Call | None) -> Call | None:
    """Return the first call, beginning with this one, of a module around the module at a path, or of that module."""
    while call is not None and call.path and not f"{path}.".startswith(f"{call.path}."):
        call = call.parent
    return call


def _unit(call: Call) -> nn.Module:
    """Return the module that is called. If it is a sequence that makes up the whole module around it, return that
    module, whose class is more telling: the double convolution of which it is the ``net``."""
    while call.parent is not None and call.parent.path and is_sequential(call.module):
        if call.parent.inputs != call.inputs or call.parent.outputs != call.outputs:
            break
        call = call.parent
    return call.module


def steps_of(record: Record, call: Call, opened: Container[str]) -> Steps:
    """Return the steps of a call in order: its own operations and the calls of modules; opened modules are expanded."""
    steps: Steps = []
    position = call.start
    for child in call.children:
        steps += record.ops[position : child.start]
        steps += steps_of(record, child, opened) if child.path in opened else [child]
        position = child.end
    return steps + record.ops[position : call.end]


def _span(steps: Steps) -> range:
    """Return the indices of the operations in consecutive steps."""
    first, last = steps[0], steps[-1]
    start = first.start if isinstance(first, Call) else first.index
    return range(start, last.end if isinstance(last, Call) else last.index + 1)


def _part(steps: Steps, path: str, sites: list[Site]) -> Steps:
    """Return the steps of a block that is a part of a larger graph: from its first module to its last, or to its SE."""
    own = {path, *(site.path for site in sites)}
    inside = [step.path is not None and (step.path in own or step.path.startswith(f"{path}.")) for step in steps]
    first, end = inside.index(True), len(inside) - inside[::-1].index(True)
    while sites[0].kind != "chain" and end < len(steps) and steps[end].module is None and steps[end].path is None:
        end += 1
    return steps[first:end]


def graph_of(record: Record, steps: Steps, call: Call | None = None) -> BlockGraph:
    """Return the part of a record's graph for consecutive steps: those of a whole ``call``, with its inputs and
    outputs; or, without a call, with paths from the model's root."""
    copies = _Copies(record, "" if call is None else call.path)
    given = [copies.placeholder(op) for op in dict.fromkeys(call.inputs if call is not None else ())]
    for step in steps:
        if isinstance(step, Call):
            copies.add_call(step)
        elif step.role != "param":
            copies.add(node_of(step))
    outputs = call.outputs if call is not None else _leaving(record, steps)
    results = tuple(copies[node_of(op)] for op in outputs)
    graph = copies.block.graph
    graph.output(results[0] if len(results) == 1 else results)
    graph.eliminate_dead_code(lambda node: node.op in ("call_module", "output") or node in given)
    return copies.block


def _leaving(record: Record, steps: Steps) -> list[Op]:
    """Return the values of some steps that are used after them."""
    made = [op for step in steps for op in (step.outputs if isinstance(step, Call) else [step])]
    end, outputs = _span(steps).stop, record.calls[0].outputs
    return [op for op in made if op in outputs or any(user.index >= end for user in op.users)]


def node_of(op: Op) -> fx.Node:
    assert op.node is not None  # only a record made for comparison has no graph
    return op.node


class _Copies(dict[fx.Node, fx.Node]):
    """The copies in a block's graph of nodes of a record's graph; missing ones are copied when they are looked up."""

    def __init__(self, record: Record, scope: str) -> None:
        self.record, self.ops, self.block = record, record.op_of, BlockGraph(fx.Graph(), scope)

    def __missing__(self, node: fx.Node) -> fx.Node:
        # nodes without inputs are copied on first use, as are those that return several tensors, one operation each
        op = self.ops.get(node)
        return self.add(node) if op is None or op.role == "param" else self.placeholder(op)

    def placeholder(self, op: Op) -> fx.Node:
        """Add an input for a value that is computed elsewhere."""
        graph, node = self.block.graph, node_of(op)
        given = graph.find_nodes(op="placeholder")
        with graph.inserting_after(given[-1]) if given else graph.inserting_before():
            self[node] = graph.placeholder(f"x_{len(given)}" if given else "x")
        self[node].meta.update(node.meta, ops=[op])
        return self[node]

    def add(self, node: fx.Node) -> fx.Node:
        """Copy a node like ``graph.node_copy``, with its target and name relative to the block."""
        ops = [self.ops[n] for n in ([node] if node in self.ops else node.users) if n in self.ops]
        target, name = node.target, ops[0].name if isinstance(node.target, torch._ops.OpOverload) else None
        if node.op in ("call_module", "get_attr"):
            target, name = self.named(str(target))
        args, kwargs = map_arg((node.args, node.kwargs), self.__getitem__)
        copy = self[node] = self.block.graph.create_node(node.op, target, args, kwargs, name)
        copy.meta.update(node.meta, ops=ops)
        if node.op == "call_module":
            copy.meta["module"] = self.record.model.get_submodule(str(node.target))
        return copy

    def add_call(self, call: Call) -> None:
        """Add one node for the whole call of a module."""
        args = tuple(self[node_of(op)] for op in dict.fromkeys(call.inputs))
        target, name = self.named(call.path)
        node = self.block.graph.create_node("call_module", target, args, name=name)
        node.meta.update(call=call.parent, where=call.where, module=call.module, ops=call.outputs)
        if call.returned is not None:
            node.meta.update(shape=call.returned.shape, dtype=call.returned.dtype)
        self.update((node_of(op), node) for op in call.outputs)

    def named(self, path: str) -> tuple[str, str]:
        """Return a path relative to the block, and the name of its node."""
        target = path.removeprefix(f"{self.block.scope}.") if self.block.scope else path
        return target, re.sub(r"\W", "_", self.block.path(target))
