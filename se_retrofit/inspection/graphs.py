"""The graph of each retrofitted block, before and after, as ``torch.fx.Graph`` with the shapes that flow in it.

A block's call is shown as it was recorded: its own operations and the modules that it calls. Containers without a forward of
their own (``nn.Sequential``) and modules that hold an SE module are opened, so that the SE stands among its neighbours. The
graph before is that of a copy without SE, not derived from the graph after.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from ..errors import RetrofitError, check_module
from ..plan import Plan
from ..retrofit import plan_of
from ..surgery.record.graph import Call, Op, Record
from ..surgery.record.inputs import Inputs, described_inputs, given_inputs
from ..surgery.record.roles import is_sequential
from ..surgery.record.runs import record
from ..surgery.splice.undo import is_retrofitted
from .blocks import BlockGraph, BlockPair, class_name, join

__all__ = ["Recorded", "find_block", "graph_of", "recorded"]


@dataclass(eq=False)
class Recorded:
    """A retrofitted model, its plan, its record and that of a copy without SE, and its blocks in the order of the plan."""

    model: nn.Module
    plan: Plan
    record: Record
    original: Record
    blocks: list[BlockPair] = field(default_factory=list)

    def distinct(self) -> list[list[BlockPair]]:
        """The blocks in groups of the same structure, the one that shows it best first: of dense layers, the first that
        is given several feature maps."""
        groups: dict[tuple[Any, ...], list[BlockPair]] = {}
        for block in self.blocks:
            groups.setdefault(block.signature(), []).append(block)
        for group in groups.values():
            best = max(group, key=lambda pair: min(pair.inputs, 2))
            group.remove(best)
            group.insert(0, best)
        return list(groups.values())


def inputs_of(model: nn.Module, plan: Plan, example_inputs: Any) -> Inputs | None:
    """The inputs given, or of the shapes that the model's plan was made on."""
    if example_inputs is not None:
        return given_inputs(example_inputs)
    try:
        return described_inputs(plan.inputs, model)
    except ValueError as error:
        raise RetrofitError(f"{error}; or give example_inputs") from None


def recorded(model: nn.Module, example_inputs: Any = None) -> Recorded:
    """Record a retrofitted model and a copy of it without SE, and find the graph of each of its blocks in both.

    Args, raises: as ``inspect``.
    """
    check_module(model)
    try:
        plan = plan_of(model)
    except RetrofitError as error:
        raise RetrofitError(
            f"{error}: call add_se(model) first, or print(plan_se(model)) to see what it would do"
        ) from None
    inputs = inputs_of(model, plan, example_inputs)
    after = record(model, inputs)
    original = record(model, after.inputs, without_se=True)
    blocks: dict[str, BlockPair] = {}
    for site in plan.sites:
        if site.block not in blocks:
            module = _submodule(model, site.block)
            cls = class_name(_unit_around(after, site.block, module))
            blocks[site.block] = BlockPair(site.block, site.kind, cls, [], module, model, after)
        blocks[site.block].sites.append(site)
    graphs = _Graphs(original, after)
    for pair in blocks.values():
        graphs.fill(pair)
    return Recorded(model, plan, after, original, list(blocks.values()))


def find_block(found: Recorded, path: str) -> BlockPair:
    """The block of this path, the one that an SE module or another module of this path is in, or the only one in it.

    Raises:
        RetrofitError: there is none; the message lists some that there are.
    """
    for names in (_own_names, _inner_names):
        for pair in found.blocks:
            if path in names(pair):
                return pair
    blocks = [pair for pair in found.blocks if pair.path]
    around = [pair for pair in blocks if path and pair.path.startswith(f"{path}.")]
    if path in dict(found.model.named_modules()):
        within = [pair for pair in blocks if path.startswith(f"{pair.path}.")]
        if within:
            return max(within, key=lambda pair: len(pair.path))
        if len(around) == 1:
            return around[0]
    paths = [pair.path for pair in around or found.blocks]
    few = ", ".join(paths[:6]) + (f", ... ({len(paths)} in all)" if len(paths) > 6 else "")
    if around:
        raise RetrofitError(f"{len(around)} blocks with SE are in {path!r}, name one: {few}")
    raise RetrofitError(f"no retrofitted block {path!r}; the blocks with SE are {few}")


def _own_names(pair: BlockPair) -> list[str]:
    return [pair.path, *(site.path for site in pair.sites)]


def _inner_names(pair: BlockPair) -> list[str]:
    """The modules that a block calls."""
    return [] if pair.after is None else [join(pair.after.scope, str(node.target)) for node in pair.after.modules]


# From records to graphs -----------------------------------------------------------------------------------------------


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a path that only the graph of a GraphModule knows
        return model


def _unit_around(record: Record, path: str, module: nn.Module) -> nn.Module:
    """The module that a sequence is all of, which tells what it is: the double convolution whose ``net`` it is."""
    call = next((call for call in record.calls if call.path == path), None)
    while call is not None and call.parent is not None and call.parent.path and is_sequential(call.module):
        if call.parent.inputs != call.inputs or call.parent.outputs != call.outputs:
            break
        call = call.parent
    return module if call is None or call.path == path else call.module


class _Graphs:
    """The graphs of calls in the record of a network without SE, and with it."""

    def __init__(self, original: Record, record: Record) -> None:
        self.original = _calls_by_path(original)
        self.calls = _calls_by_path(record)
        # what is open after is open before, so that the two differ in nothing but SE
        self.opened = {path for path, calls in self.calls.items() if _opens(calls[0].module)}
        self.made: dict[str, tuple[BlockGraph, BlockGraph]] = {}

    def fill(self, pair: BlockPair) -> None:
        """Put the graphs into a pair, or the reason why there are none."""
        scope = self.scope(pair)
        if scope is None or scope not in self.original:
            pair.failure = "it is not called on these inputs"
            return
        pair.calls = len(self.calls[scope])
        if scope not in self.made:
            before, after = self.original[scope][0], self.calls[scope][0]
            self.made[scope] = graph_of(before, self.opened), graph_of(after, self.opened)
        pair.before, pair.after = self.made[scope]
        if scope != pair.path:
            pair.whole = pair.after
            pair.before, pair.after = _slices(pair, pair.before, pair.after)

    def scope(self, pair: BlockPair) -> str | None:
        """Path of the innermost module that is called and holds the block and its sites."""
        paths = [pair.path, *(site.path.rpartition(".")[0] for site in pair.sites)]
        candidate = pair.path
        while True:
            if candidate in self.calls and all(
                p == candidate or not candidate or p.startswith(f"{candidate}.") for p in paths
            ):
                return candidate
            if not candidate:
                return None
            candidate = candidate.rpartition(".")[0]


def _calls_by_path(record: Record) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {}
    for call in record.calls:
        calls.setdefault(call.path, []).append(call)
    return calls


def _opens(module: nn.Module) -> bool:
    return is_sequential(module) or any(is_retrofitted(m) for m in module.modules())


def graph_of(call: Call, opened: set[str]) -> BlockGraph:
    """The graph of a call, with the calls of opened modules put in."""
    result = BlockGraph(fx.Graph(), {}, {}, call.path)
    nodes: dict[Op, fx.Node] = {}
    drawn = _Drawing(result, call, opened, nodes)
    for op in dict.fromkeys(call.inputs):
        drawn.placeholder(op)
    drawn.put_in(call)
    result.graph.output(
        tuple(drawn.node(o) for o in call.outputs) if len(call.outputs) != 1 else drawn.node(call.outputs[0])
    )
    return result


@dataclass(eq=False)
class _Drawing:
    result: BlockGraph
    scope: Call
    opened: set[str]
    nodes: dict[Op, fx.Node]

    def placeholder(self, op: Op) -> fx.Node:
        graph = self.result.graph
        before = graph.find_nodes(op="placeholder")
        first = next(iter(graph.nodes), None)
        with graph.inserting_after(before[-1]) if before else graph.inserting_before(first):
            node = graph.placeholder("x" if not before else f"x_{len(before)}")
        self.nodes[op] = node
        self.result.values[node] = [op]
        return node

    def node(self, op: Op) -> fx.Node:
        """The node that makes a value; a parameter's, or a new input for one that comes from elsewhere."""
        if op not in self.nodes:
            if op.role != "param":
                return self.placeholder(op)
            named = op
            while named.path is None and named.inputs:
                named = named.inputs[0]
            path = named.path or "constant"
            self.nodes[op] = self.result.graph.create_node("get_attr", self.relative(path), (), {})
            self.result.values[self.nodes[op]] = [op]
        return self.nodes[op]

    def relative(self, path: str) -> str:
        scope = self.scope.path
        return path[len(scope) + 1 :] if scope and path.startswith(f"{scope}.") else path

    def put_in(self, call: Call) -> None:
        items: list[tuple[int, Op | Call]] = [(op.index, op) for op in _own_ops(call)]
        items += [(child.start, child) for child in call.children]
        # a module that computes nothing ends where it began, before the operation that comes next
        for _, item in sorted(items, key=lambda pair: (pair[0], isinstance(pair[1], Op))):
            if isinstance(item, Op):
                self.operation(item)
            elif item.path in self.opened:
                self.put_in(item)
            else:
                self.module(item.path, item.module, item.inputs, item.outputs)

    def operation(self, op: Op) -> None:
        if op.role in ("param", "input"):
            return
        if op.module is not None and op.path is not None:
            self.module(op.path, op.module, list(op.inputs), [op])
            return
        arguments = tuple(self.node(i) for i in op.inputs)
        target = op.node.target if op.node is not None else torch.ops.aten.alias.default
        self.nodes[op] = node = self.result.graph.create_node("call_function", target, arguments, {}, name=op.name)
        self.result.values[node] = [op]

    def module(self, path: str, module: nn.Module, inputs: list[Op], outputs: list[Op]) -> None:
        arguments = tuple(self.node(i) for i in dict.fromkeys(inputs))
        target = self.relative(path)
        node = self.result.graph.create_node(
            "call_module", target, arguments, {}, name=re.sub(r"\W", "_", self.result.path(target))
        )
        self.result.values[node] = outputs
        self.result.modules[node] = module
        for op in outputs:
            self.nodes[op] = node


def _own_ops(call: Call) -> list[Op]:
    """The operations of a call's own code on which something that a module is given or returns depends."""
    found: dict[int, Op] = {}
    stack = [op for c in call.walk() for op in (*c.outputs, *c.inputs)]
    while stack:
        op = stack.pop()
        if op.index not in found and call.holds(op):
            found[op.index] = op
            stack += op.inputs
    return [found[i] for i in sorted(found) if found[i].call is call]


# A block that is a part of a larger graph -----------------------------------------------------------------------------


def _slices(pair: BlockPair, before: BlockGraph, after: BlockGraph) -> tuple[BlockGraph, BlockGraph]:
    """The parts of two graphs that are this block: from its first module to its last or to its SE."""
    own = {site.path for site in pair.sites}

    def inside(node: fx.Node) -> bool:
        path = join(after.scope, str(node.target)) if node.op in ("call_module", "get_attr") else ""
        return bool(path) and (path in own or path == pair.path or path.startswith(f"{pair.path}."))

    nodes = list(after.graph.nodes)
    positions = [i for i, node in enumerate(nodes) if inside(node)]
    first, last = positions[0], positions[-1]
    while pair.kind != "chain" and nodes[last + 1].op in ("call_function", "call_method"):
        last += 1
    ses = set(after.ses)
    earlier = sum(node in ses for node in nodes[:first])
    part = nodes[first : last + 1]
    number = len(part) - sum(node in ses for node in part)
    original = list(before.graph.nodes)[first - earlier :][:number]
    return _slice(before, original), _slice(after, part)


def _slice(whole: BlockGraph, nodes: list[fx.Node]) -> BlockGraph:
    """A graph of some consecutive nodes, with paths from the model's root."""
    part = BlockGraph(fx.Graph(), {}, {}, "")
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in copies and source not in nodes:
                copies[source] = part.graph.placeholder("x" if not copies else f"x_{len(copies)}")
                part.values[copies[source]] = whole.values.get(source, [])
    for node in nodes:
        args = map_arg(node.args, lambda n: copies[n])
        target = join(whole.scope, str(node.target)) if node.op in ("call_module", "get_attr") else node.target
        copies[node] = part.graph.create_node(node.op, target, args, {}, _name(whole, node), node.type)
        part.values[copies[node]] = whole.values.get(node, [])
        if node in whole.modules:
            part.modules[copies[node]] = whole.modules[node]
    results = [copies[n] for n in nodes if any(user not in copies for user in n.users)]
    part.graph.output(results[0] if len(results) == 1 else tuple(results))
    return part


def _name(whole: BlockGraph, node: fx.Node) -> str:
    if node.op != "call_module" or not whole.scope:
        return node.name
    return re.sub(r"\W", "_", join(whole.scope, str(node.target)))


def batch_size(record: Record) -> int:
    """How many inputs a recorded call has: the first dim of its first tensor, or the length of a list of images."""
    first = next(iter((*record.inputs.args, *record.inputs.kwargs.values())), None)
    if isinstance(first, torch.Tensor) and first.dim() > 2:
        return int(first.shape[0])
    if isinstance(first, (list, tuple)) and first and all(isinstance(a, torch.Tensor) for a in first):
        return len(first)
    return 1
