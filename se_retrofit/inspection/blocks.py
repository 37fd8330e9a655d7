"""A block as a graph before and after its retrofit, a model with all its blocks, and their description in words."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn

from ..errors import RetrofitError
from ..plan import Plan, Site
from ..surgery.record.graph import Op, Record, tensor_of
from ..surgery.splice.derived import class_before
from ..surgery.splice.undo import is_retrofitted
from ..tables import few

END = "the block's end"


@dataclass(eq=False)
class BlockGraph:
    """The graph of a block, before or after the retrofit: a part of the graph of ``record``.

    Attributes:
        graph: the nodes. Their ``meta`` is that of the record's graph, with two additional keys: ``"ops"``, the
            operations of the record whose values a node returns (a module may return several), and ``"module"``, the
            module that a ``call_module`` node calls.
        scope: path of the module whose forward this is. The targets of nodes are relative to it, or to the model's root
            for a block that is a part of a larger graph.
    """

    graph: fx.Graph
    scope: str

    @property
    def ses(self) -> list[fx.Node]:
        """Return the nodes that call an inserted SE module."""
        return [node for node in self.graph.nodes if is_retrofitted(node.meta.get("module"))]

    def shape(self, node: fx.Node) -> str:
        """Return the shape of a node's value, without the batch dim: ``256x56x56``."""
        shapes = [op.shape if op.role == "param" else op.shape[1:] for op in node.meta.get("ops", [])]
        return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)

    def kind(self, node: fx.Node) -> str:
        """Return the class of the module that a node calls, or the name of its function."""
        if node.op == "call_module":
            return class_name(node.meta["module"])
        if node.op == "call_function":
            return "getitem" if is_getitem(node) else _sign_of(node.meta["ops"][0])
        return node.op

    def path(self, target: str) -> str:
        """Return a readable path in the block: a module with only a number for a name is named with its sequence."""
        holder = self.scope.rpartition(".")[2]
        return f"{holder}.{target}" if holder and target[:1].isdigit() else target

    def label(self, node: fx.Node) -> str:
        """Describe a node in few words: ``bn3 (BatchNorm2d)``, ``+=``, ``* layer_scale``, ``output``."""
        if node.op == "call_module":
            return f"{self.path(str(node.target))} ({self.kind(node)})"
        if node.op == "placeholder":
            return f"input {node.name}"
        if node.op == "get_attr":
            return str(node.target)
        constants = [str(n.target) for n in map(_parameter, node.all_input_nodes) if n.op == "get_attr"]
        return " ".join([self.kind(node), *constants])


def is_getitem(node: fx.Node) -> bool:
    """Return whether a node stands for one of the tensors that an operation returned."""
    return node.target in (operator.getitem, tensor_of)


def is_parameter(node: fx.Node) -> bool:
    """Return whether a node's value is a parameter or buffer, possibly reshaped."""
    ops = node.meta.get("ops", [])
    return node.op == "get_attr" or (bool(ops) and all(op.role == "param" for op in ops))


def _parameter(node: fx.Node) -> fx.Node:
    """Return the parameter that a value is a reshaped form of; return other values as they are."""
    while len(node.all_input_nodes) == 1 and is_parameter(node):
        node = node.all_input_nodes[0]
    return node


def _changes_nothing(node: fx.Node) -> bool:
    """Return whether a node returns its input's values, possibly in another shape or order."""
    given = [op for source in node.all_input_nodes for op in source.meta["ops"]]
    op = next(iter(node.meta["ops"]), None)
    while op is not None and op not in given and op.role in ("shape", "pass") and len(op.data) == 1:
        op = op.data[0]
    return op in given


@dataclass(eq=False)
class BlockPair:
    """A block before and after its retrofit.

    Attributes:
        path, kind, cls: path and kind of the block, and its class before the retrofit.
        sites: the sites in it.
        root: the model.
        after: its graph with SE.
        span: the indices of its operations in the record, in its first call.
        calls: number of calls.
    """

    path: str
    kind: str
    cls: str
    sites: list[Site]
    root: nn.Module
    after: BlockGraph
    span: range
    calls: int = 1

    @cached_property
    def before(self) -> BlockGraph:
        """The graph without SE, as ``add_se`` recorded it; ``add_se`` compares the two when it retrofits."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.after.graph.nodes:
            if node in self.after.ses:
                copies[node] = copies[node.all_input_nodes[0]]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return BlockGraph(graph, self.after.scope)

    @property
    def is_part(self) -> bool:
        """Whether the block is a part of the graph of a module around it."""
        return self.after.scope != self.path

    @property
    def inputs(self) -> int:
        """Number of feature maps that the block takes."""
        return len(self.after.graph.find_nodes(op="placeholder"))

    def se_node(self, site: Site) -> fx.Node | None:
        """Return the node that calls a site's SE module."""
        return next((node for node in self.after.ses if join(self.after.scope, str(node.target)) == site.path), None)

    def se_after(self, site: Site) -> str:
        """Describe what computes the value that a site's SE scales: a layer, even if its output is permuted first."""
        node = self.se_node(site)
        if node is None:
            return site.after
        source = node.all_input_nodes[0]
        while len(source.all_input_nodes) == 1 and _changes_nothing(source):
            source = source.all_input_nodes[0]
        return self.after.label(source)

    def se_before(self, site: Site) -> str:
        """Describe what uses the value that a site's SE has scaled."""
        node = self.se_node(site)
        takers = [END if user.op == "output" else self.after.label(user) for user in (node.users if node else ())]
        takers = list(dict.fromkeys(takers))
        return ", ".join(takers) if len(takers) < 3 else f"{takers[0]} and {len(takers) - 1} more"

    def signature(self) -> tuple[Any, ...]:
        """A key that is equal for blocks that only differ in names and numbers of channels. Dense layers may also
        differ in the number of feature maps that they take."""
        given = self.after.graph.find_nodes(op="placeholder")
        made = [node for node in self.after.graph.nodes if node not in given]
        order = dict.fromkeys(given, -1) | {node: i for i, node in enumerate(made)}
        rows = []
        for node in made:
            module = node.meta.get("module")
            conv = isinstance(module, nn.modules.conv._ConvNd)
            detail = (module.kernel_size, module.groups > 1) if conv else None
            takes = tuple(dict.fromkeys(order[source] for source in node.all_input_nodes))
            rows.append((node.op, self.after.kind(node), detail, takes))
        return (self.cls, self.kind, tuple(rows))


@dataclass(eq=False, repr=False)
class Inspected:
    """A model, its plan, the record of one run, and its blocks with SE, in the order of the plan."""

    model: nn.Module
    plan: Plan
    record: Record
    blocks: list[BlockPair]

    def distinct(self) -> list[list[BlockPair]]:
        """Return the blocks in groups of the same structure, each starting with the most telling one: among dense
        layers, the first that takes several feature maps."""
        groups: dict[tuple[Any, ...], list[BlockPair]] = {}
        for block in self.blocks:
            groups.setdefault(block.signature(), []).append(block)
        return [sorted(group, key=lambda pair: pair.inputs < 2) for group in groups.values()]

    def block(self, path: str) -> BlockPair:
        """Return a block, which has a ``before.graph``, an ``after.graph`` and its ``sites``.

        Raises:
            RetrofitError: If there is no such block.
        """
        exact = [pair for pair in self.blocks if path == pair.path or path in [site.path for site in pair.sites]]
        known = path and path in dict(self.model.named_modules())
        around = [pair for pair in self.blocks if known and pair.path and path.startswith(f"{pair.path}.")]
        within = [pair for pair in self.blocks if known and pair.path.startswith(f"{path}.")]
        if exact or around:
            return exact[0] if exact else max(around, key=lambda pair: len(pair.path))
        if len(within) == 1:
            return within[0]
        there = few((pair.path for pair in within or self.blocks), 6)
        if within:
            raise RetrofitError(f"{len(within)} blocks with SE are in {path!r}, name one: {there}")
        raise RetrofitError(f"no block with SE that runs on these inputs is {path!r}; those that do are {there}")


def join(*parts: str) -> str:
    """Join parts, any of which may be empty, to a module path."""
    return ".".join(part for part in parts if part)


def _sign_of(op: Op) -> str:
    sign = {"add": "+", "mul": "*", "sub": "-", "div": "/"}.get(op.name)
    return op.name if sign is None else sign + "=" * op.inplace


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class before the retrofit."""
    return class_before(module).__name__


def describe(module: nn.Module) -> str:
    """Describe a module in few words: ``Conv2d 64 -> 256, 1x1``, ``SE 256 -> 16 -> 256``."""
    name = class_name(module)
    if is_retrofitted(module):
        return module.summary()
    if isinstance(module, nn.modules.conv._ConvNd):
        words = [f"{name} {module.in_channels} -> {module.out_channels}", "x".join(map(str, module.kernel_size))]
        if any(s != 1 for s in module.stride):
            words.append(f"stride {module.stride[0] if len(set(module.stride)) == 1 else module.stride}")
        if module.groups > 1:
            words.append("depthwise" if module.groups == module.in_channels else f"{module.groups} groups")
        return ", ".join(words)
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features} -> {module.out_features}"
    return name
