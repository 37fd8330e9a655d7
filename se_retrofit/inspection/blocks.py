"""A block as a graph, before and after its retrofit, and in words."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx, nn

from ..plan import Site
from ..surgery.record.graph import Op, tensor_of
from ..surgery.splice.derived import RetrofittedBlock
from ..surgery.splice.undo import is_retrofitted

__all__ = ["BlockGraph", "BlockPair", "class_name", "describe", "is_getitem", "is_parameter", "join", "sign_of"]

END = "the block's end"


@dataclass(eq=False)
class BlockGraph:
    """One graph of a block, before or after: a part of the graph of ``record``.

    Attributes:
        graph: its nodes. Their ``meta`` is that of the record's graph, with two keys more: ``"ops"``, the operations of the
            record whose values a node gives (a module may return several), and ``"module"``, the one that a ``call_module``
            node calls.
        scope: path of the module whose forward this is. The targets of nodes are paths from there; from the model's root for
            a block that is a part of a larger graph.
    """

    graph: fx.Graph
    scope: str

    @property
    def ses(self) -> list[fx.Node]:
        """The nodes that call an inserted SE module."""
        return [node for node in self.graph.nodes if is_retrofitted(node.meta.get("module"))]

    def shape(self, node: fx.Node) -> str:
        """What a node computes, without the batch dim: ``256x56x56``."""
        shapes = [op.shape if op.role == "param" else op.shape[1:] for op in node.meta.get("ops", [])]
        return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)

    def kind(self, node: fx.Node) -> str:
        """Class of the module that a node calls, or the name of its function."""
        if node.op == "call_module":
            return class_name(node.meta["module"])
        if node.op == "call_function":
            return "getitem" if is_getitem(node) else sign_of(node.meta["ops"][0])
        return node.op

    def path(self, target: str) -> str:
        """A path in the block as people read it: what has a number alone for a name is named with the sequence that it is in."""
        holder = self.scope.rpartition(".")[2]
        return f"{holder}.{target}" if holder and target[:1].isdigit() else target

    def label(self, node: fx.Node) -> str:
        """A node in few words: ``bn3 (BatchNorm2d)``, ``+=``, ``* layer_scale``, ``output``."""
        if node.op == "call_module":
            return f"{self.path(str(node.target))} ({self.kind(node)})"
        if node.op == "placeholder":
            return f"input {node.name}"
        if node.op == "get_attr":
            return str(node.target)
        constants = [str(n.target) for n in map(_parameter, node.all_input_nodes) if n.op == "get_attr"]
        return " ".join([self.kind(node), *constants])


def is_getitem(node: fx.Node) -> bool:
    """Whether a node stands for one of the tensors that an operation returned."""
    return node.target in (operator.getitem, tensor_of)


def is_parameter(node: fx.Node) -> bool:
    """Whether a node's value is a parameter or buffer, or another shape of one."""
    ops = node.meta.get("ops", [])
    return node.op == "get_attr" or (bool(ops) and all(op.role == "param" for op in ops))


def _parameter(node: fx.Node) -> fx.Node:
    """The parameter that a value is another shape of; other values are themselves."""
    while len(node.all_input_nodes) == 1 and is_parameter(node):
        node = node.all_input_nodes[0]
    return node


def _changes_nothing(node: fx.Node) -> bool:
    """Whether a node gives the values that it takes, if in another shape or order."""
    given = [op for source in node.all_input_nodes for op in source.meta["ops"]]
    op = next(iter(node.meta["ops"]), None)
    while op is not None and op not in given and op.role in ("shape", "pass") and len(op.data) == 1:
        op = op.data[0]
    return op in given


@dataclass(eq=False)
class BlockPair:
    """A block before and after its retrofit.

    Attributes:
        path, kind, cls: of the block, and its class before the retrofit.
        sites: those that are in it.
        root: the model.
        after: its graph.
        span: the indices of its operations in the record, in its first call.
        calls: how often it is called.
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
        """Its graph without SE, as ``add_se`` has seen it: it compares the two when it retrofits."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.after.graph.nodes:
            if node in self.after.ses:
                copies[node] = copies[node.all_input_nodes[0]]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return BlockGraph(graph, self.after.scope)

    @property
    def is_part(self) -> bool:
        """Whether it is a part of the graph of a module around it."""
        return self.after.scope != self.path

    @property
    def inputs(self) -> int:
        """How many feature maps it is given."""
        return len(self.after.graph.find_nodes(op="placeholder"))

    def se_node(self, site: Site) -> fx.Node | None:
        """The node that calls a site's SE module."""
        return next((node for node in self.after.ses if join(self.after.scope, str(node.target)) == site.path), None)

    def se_after(self, site: Site) -> str:
        """What gives the value that a site's SE scales, in few words: a layer, even if its output is permuted first."""
        node = self.se_node(site)
        if node is None:
            return site.after
        source = node.all_input_nodes[0]
        while len(source.all_input_nodes) == 1 and _changes_nothing(source):
            source = source.all_input_nodes[0]
        return self.after.label(source)

    def se_before(self, site: Site) -> str:
        """What takes the value that a site's SE has scaled, in few words."""
        node = self.se_node(site)
        takers = [END if user.op == "output" else self.after.label(user) for user in (node.users if node else ())]
        takers = list(dict.fromkeys(takers))
        return ", ".join(takers) if len(takers) < 3 else f"{takers[0]} and {len(takers) - 1} more"

    def signature(self) -> tuple[Any, ...]:
        """Equal for blocks that differ in nothing but names and numbers of channels. How many feature maps it is given makes no
        other block of a dense layer."""
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


def join(*parts: str) -> str:
    """A module path from parts, any of which may be empty."""
    return ".".join(part for part in parts if part)


def sign_of(op: Op) -> str:
    """An operation in few words: ``cat``, ``+=``."""
    sign = {"add": "+", "mul": "*", "sub": "-", "div": "/"}.get(op.name)
    return op.name if sign is None else sign + "=" * op.inplace


def class_name(module: nn.Module) -> str:
    """Name of a module's class as it was before a retrofit."""
    cls = type(module)
    return (cls.se_recipe.base if issubclass(cls, RetrofittedBlock) else cls).__name__


def describe(module: nn.Module) -> str:
    """A module in few words: ``Conv2d 64 -> 256, 1x1``, ``SE 256 -> 16 -> 256``."""
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
