"""The whole network at the level of its blocks, with the connections between them, including those that skip blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ..surgery.record.graph import Call, Op
from ..surgery.splice.undo import is_retrofitted
from .blocks import BlockGraph, BlockPair, Inspected, class_name, describe
from .graphs import graph_of, steps_of

MOST_OPERATIONS = 8  # after the last module; up to so many are shown one by one
JOINS = {"+": "+", "+=": "+", "*": "\u00d7", "*=": "\u00d7", "-": "-", "cat": "cat", "concat": "cat"}


@dataclass(eq=False)
class Node:
    """A box of the picture."""

    name: str  # path of a block or module, or of the first of several in a row; for a join, its sign
    words: str  # classes of the modules
    kind: str  # "block", "module", "join" or "function"
    block: BlockPair | None
    ses: int
    bypass: bool  # whether an input of the block reaches its output without passing its SE
    shape: tuple[int, ...]  # of its output, without the batch
    space: tuple[int, ...]  # the spatial part of its shape, which is the stage; () for a vector
    last: str = ""  # of several modules in a row, the last
    taken: list[Node] = field(default_factory=list)

    def beside(self, path: str) -> bool:
        """Return whether a module has the same parent as the last of these layers."""
        return self.last != "" and self.last.rpartition(".")[0] == path.rpartition(".")[0]


@dataclass(frozen=True)
class Edge:
    """A connection; it ``skips`` nodes if another path leads from its source to its end."""

    source: Node
    end: Node
    skips: bool


@dataclass
class Network:
    """The nodes in order of execution, and their connections."""

    nodes: list[Node]
    edges: list[Edge]


def network_of(found: Inspected) -> Network:
    """Return the network of an inspected model: its blocks, the modules between them, and the joins of values."""
    called = {pair.path for pair in found.blocks if not pair.is_part}
    opened = {
        call.path
        for call in found.record.calls
        if (not call.path or call.path not in called)
        and (_joins_stages(call) or any(map(is_retrofitted, call.module.modules())))
    }
    root = next(call for call in found.record.calls if not call.path)
    whole = graph_of(found.record, steps_of(found.record, root, opened), root)
    by_op = {
        op: pair for pair in found.blocks if pair.is_part for op in found.record.ops[pair.span.start : pair.span.stop]
    }
    by_path = {pair.path: pair for pair in found.blocks if pair.path in called and pair.path}
    return _connected(_collapsed(_Nodes(whole, by_path, by_op, found.blocks).made()))


def _joins_stages(call: Call) -> bool:
    """Return whether a module combines feature maps of several stages, such as the decoder of a U-Net."""
    sizes = {op.shape[2:] for op in call.inputs if op.dim > 2}
    return len(sizes) > 2 and call.returned is not None and call.returned.dim > 2


@dataclass
class _Nodes:
    whole: BlockGraph
    by_path: dict[str, BlockPair]
    by_op: dict[Op, BlockPair]
    pairs: list[BlockPair]
    result: list[Node] = field(default_factory=list)
    seen: dict[fx.Node, list[Node]] = field(default_factory=dict)  # the nodes that compute, or pass on, a value

    def made(self) -> list[Node]:
        node: Node | None = None  # that of the block, a part of a graph, to which the last value belongs
        for fx_node in self.whole.graph.nodes:
            ops = fx_node.meta.get("ops", [])
            taken = list(dict.fromkeys(n for source in fx_node.all_input_nodes for n in self.seen.get(source, [])))
            pair = next((self.by_op[op] for op in ops if op in self.by_op), None)
            if pair is None:
                node = None
                self.seen[fx_node] = self.other(fx_node, ops, taken)
                continue
            if node is None or node.block is not pair:
                node = self.add(pair.path or "(model)", pair.cls, "block", ops, taken, pair)
            node.taken += [n for n in taken if n is not node and n not in node.taken]
            node.shape, node.space = _shapes(ops)
            self.seen[fx_node] = [node]
        return self.result

    def other(self, fx_node: fx.Node, ops: list[Op], taken: list[Node]) -> list[Node]:
        """Return the nodes for a value outside the blocks that are parts of graphs."""
        module, kind = fx_node.meta.get("module"), self.whole.kind(fx_node)
        if fx_node.op == "get_attr":
            return []
        if fx_node.op == "placeholder":
            return [self.add("input", "", "function", ops, [])]
        if module is not None:
            path = str(fx_node.target)
            pair = self.by_path.get(path)
            if pair is not None:
                return [self.add(path, pair.cls, "block", ops, taken, pair)]
            if is_retrofitted(module):  # the network itself is the block
                own = next((p for p in self.pairs if any(site.path == path for site in p.sites)), None)
                node = self.add(path, describe(module), "block", ops, taken)
                node.block, node.ses = own, 1
                return [node]
            if not any(True for _ in module.children()):
                return [self.leaf(path, class_name(module), ops, taken, fx_node)]
            return [self.add(path, class_name(module), "module", ops, taken)]
        if kind in JOINS and len(taken) > 1:
            return [self.add(JOINS[kind], "", "join", ops, taken)]
        if len(taken) == 1 and ops and _shapes(ops)[1] not in ((), taken[0].space):
            return [self.add(kind.replace("_", " "), "", "function", ops, taken)]
        return taken

    def leaf(self, path: str, words: str, ops: list[Op], taken: list[Node], fx_node: fx.Node) -> Node:
        """Add a layer; consecutive layers without other users of their values are merged into one node."""
        before = self.result[-1] if self.result else None
        alone = all(len(source.users) == 1 for source in fx_node.all_input_nodes)
        if before is not None and before.kind == "module" and taken == [before] and alone and before.beside(path):
            before.last, before.words = path, f"{before.words}, {words}"
            before.shape, before.space = _shapes(ops)
            return before
        node = self.add(path, words, "module", ops, taken)
        node.last = path
        return node

    def add(
        self, name: str, words: str, kind: str, ops: list[Op], taken: list[Node], pair: BlockPair | None = None
    ) -> Node:
        ses, bypass = (len(pair.sites), _has_bypass(pair)) if pair is not None else (0, False)
        node = Node(name, words, kind, pair, ses, bypass, *_shapes(ops), taken=list(taken))
        self.result.append(node)
        return node


def _shapes(ops: list[Op]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a value without the batch, and its spatial part."""
    if not ops:
        return (), ()
    op = ops[0]
    shape = tuple(op.shape[1:])
    if op.dim < 3:
        return shape, ()
    channel = op.dim + op.channel_dim if op.channel_dim is not None else 1
    return shape, tuple(size for dim, size in enumerate(op.shape) if dim not in (0, channel))


def _has_bypass(pair: BlockPair) -> bool:
    """Return whether an input reaches a block's output without passing its SE."""
    past = set(pair.after.graph.find_nodes(op="placeholder"))
    for node in pair.after.graph.nodes:
        if node not in pair.after.ses and past.intersection(node.all_input_nodes):
            past.add(node)
    return any(node.op == "output" for node in past)


def _collapsed(nodes: list[Node]) -> list[Node]:
    """Replace a long computation on vectors after all modules, such as a detector's selection of boxes, by one node."""
    kept: set[Node] = set()
    for node in reversed(nodes):
        if node in kept or node.space or node.kind in ("block", "module") or not node.taken:
            kept.update((node, *node.taken))
    rest = [node for node in nodes if node not in kept]
    if len(rest) <= MOST_OPERATIONS:
        return nodes
    taken = dict.fromkeys(source for node in rest for source in node.taken if source in kept)
    whole = Node(f"{len(rest)} operations", "", "function", None, 0, False, rest[-1].shape, (), taken=list(taken))
    return [*(node for node in nodes if node in kept), whole]


def _connected(nodes: list[Node]) -> Network:
    """Connect the nodes; a connection is a skip if its source also precedes another source."""
    position = {node: i for i, node in enumerate(nodes)}
    ancestors: dict[Node, int] = {}
    edges = []
    for node in nodes:
        bits = 0
        for source in node.taken:
            bits |= ancestors[source] | 1 << position[source]
        ancestors[node] = bits
        for source in node.taken:
            others = [other for other in node.taken if other is not source]
            edges.append(Edge(source, node, any(ancestors[o] >> position[source] & 1 for o in others)))
    return Network(nodes, edges)
