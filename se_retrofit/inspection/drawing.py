"""Pictures of blocks before and after, side by side, and of a whole network with its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ..surgery.splice.undo import is_retrofitted
from ..tables import few
from .blocks import BlockGraph, BlockPair, Inspected, class_name, describe, is_getitem, is_parameter
from .layout import layered
from .network import JOINS, network_of
from .picture import picture
from .svg import BOLD, LETTER, RADIUS, Picture, arrow, box, file_of, join, text

HEIGHT, GAP, STUB = 34, 34, 16  # height of a box; gap below it; part of that where arrows go straight down
MOST = 34  # letters per line
MARGIN = 12
WIDEST = 1200  # maximum width of a row of blocks

ROLES = (
    ("conv", ("conv", "linear")),
    ("norm", ("norm",)),
    ("act", ("relu", "elu", "silu", "swish", "sigmoid", "mish")),
    ("pool", ("pool",)),
)


def drawn(found: Inspected, block: BlockPair | None) -> str:
    """Return the SVG file of one block before and after, or of the whole network with each distinct block."""
    groups = found.distinct() if block is None else [[block]]
    frames = [_frame(group) for group in groups]
    if block is None:
        frames.insert(0, picture(network_of(found), {}))
    name = class_name(found.model) if block is None else f"{block.path} before and after"
    return file_of(_in_rows(frames), name)


def _in_rows(frames: Iterable[Picture]) -> Picture:
    """Arrange pictures in rows, as many side by side as there is room for."""
    parts: list[str] = []
    x, y, width, height = float(MARGIN), float(MARGIN), 0.0, 0.0
    for frame in frames:
        if x > MARGIN and x + frame.width > WIDEST:
            x, y, height = MARGIN, y + height + 2 * MARGIN, 0.0
        parts.append(frame.svg("", at=(x, y)))
        x += frame.width + 2 * MARGIN
        width, height = max(width, x - MARGIN), max(height, frame.height)
    return Picture(width, y + height + MARGIN, tuple(parts))


def _frame(group: list[BlockPair]) -> Picture:
    """Draw a block before and after, with its name and those of similar blocks."""
    pair, *others = group
    alike = f"like it: {few(other.path for other in others)}" if others else ""
    title = f"{pair.path or '(model)'}: {pair.cls}, {pair.kind}"
    parts = [text("name", 0, 12, title)]
    parts += [text("words", 0, 26, alike)] if others else []
    x, height = 0.0, 0.0
    for word, side in zip(("before", "after"), sides_of(pair), strict=True):
        width = side.width + 2 * MARGIN
        height = side.height + 2 * MARGIN + 10
        parts.append(f'<rect class="panel" x="{x + 1:.0f}" y="37" width="{width:.0f}" height="{height:.0f}" rx="8"/>')
        parts.append(text("words", x + MARGIN, 52, word))
        parts.append(side.svg(f"{pair.path} {word}", at=(x + MARGIN, 37 + MARGIN + 10)))
        x += width + MARGIN
    return Picture(max(x - MARGIN, BOLD * len(title), LETTER * (len(alike) + 1)) + 2, height + 40, tuple(parts))


def sides_of(pair: BlockPair) -> list[Picture]:
    """Draw a block before and after, as two pictures of the same size with aligned nodes."""
    diagram = _Diagram(*_drawn(pair.after))
    return [diagram.picture(without_se=True), diagram.picture()]


@dataclass(frozen=True)
class _Node:
    """A node of a picture: a join, or a box with lines of text, coloured by its role; and the shape of its value."""

    role: str
    lines: tuple[str, ...]
    shape: str

    @property
    def width(self) -> float:
        """Width that the text needs."""
        name, *more = self.lines
        return 20 + max(BOLD * len(name), LETTER * max(map(len, more), default=0))


def _drawn(block: BlockGraph) -> tuple[list[_Node], list[tuple[int, int]]]:
    """Return the nodes to draw for a block's graph, and their edges. All outputs of an operation are one node, and so
    is a list of inputs; parameters are named where they are used."""
    given = block.graph.find_nodes(op="placeholder")
    parts: dict[fx.Node, list[fx.Node]] = {}
    origin: dict[fx.Node, fx.Node] = {}
    for node in block.graph.nodes:
        if is_parameter(node):
            continue
        origin[node] = node
        if is_getitem(node):
            origin[node] = origin[node.all_input_nodes[0]]
        elif node in given and len(given) > 2:
            origin[node] = given[0]
        parts.setdefault(origin[node], []).append(node)
    number = {node: i for i, node in enumerate(parts)}
    edges: dict[tuple[int, int], None] = {}
    nodes = []
    for node, own in parts.items():
        sources = dict.fromkeys(origin[source] for source in node.all_input_nodes if source in origin)
        edges.update(dict.fromkeys((number[source], number[node]) for source in sources))
        nodes.append(_node(block, node, own, len(sources)))
    return nodes, list(edges)


def _node(block: BlockGraph, node: fx.Node, parts: list[fx.Node], inputs: int) -> _Node:
    shapes = list(dict.fromkeys(shape for part in parts for shape in block.shape(part).split(", ") if shape))
    shape = ", ".join(shapes[:2]).replace("x", "\u00d7") + (", ..." if len(shapes) > 2 else "")
    module, kind = node.meta.get("module"), block.kind(node)
    if inputs > 1 and kind in JOINS:
        return _Node("join", (JOINS[kind],), shape)
    if module is None:
        lines = [block.label(node).replace("* ", "\u00d7 ")]
    else:
        lines = [block.path(str(node.target)), describe(module).replace("->", "\u2192")]
    if is_retrofitted(module):
        return _Node("se", (lines[1], lines[0]), shape)
    low = kind.lower()
    role = next((role for role, words in ROLES if any(word in low for word in words)), "other")
    return _Node(role, tuple(line if len(line) <= MOST else f"{line[: MOST - 1]}\u2026" for line in lines), shape)


class _Diagram:
    """A graph and its layout."""

    def __init__(self, nodes: list[_Node], edges: list[tuple[int, int]]) -> None:
        self.nodes, self.edges = nodes, edges
        self.width = max(node.width for node in nodes)
        labels = [2 * (5 + LETTER * len(node.shape)) for node in nodes]
        boxes = [2 * RADIUS if node.role == "join" else self.width for node in nodes]
        layout = layered([max(sizes) for sizes in zip(labels, boxes, strict=True)], edges)
        self.x, self.row, self.lanes, self.size = layout.x, layout.row, layout.lanes, layout.width

    def picture(self, *, without_se: bool = False) -> Picture:
        """Draw the diagram; with ``without_se``, arrows lead through gaps in place of SE."""
        gaps = {i for i, node in enumerate(self.nodes) if without_se and node.role == "se"}
        parts = [self.edge(source, end, gaps) for source, end in self.edges]
        shown = [i for i in range(len(self.nodes)) if i not in gaps]
        parts += [self.node(i) for i in shown]
        sources = {source for source, _ in self.edges}  # a gap shows no shape: it passes its input on
        parts += [
            text("words", self.x[i] + 5, self.bottom(i) + STUB - 4, self.nodes[i].shape) for i in shown if i in sources
        ]
        return Picture(self.size, (max(self.row) + 1) * (HEIGHT + GAP) - GAP + 2, tuple(parts))

    def top(self, row: int) -> float:
        return 1 + row * (HEIGHT + GAP)

    def bottom(self, i: int) -> float:
        """Return where the row of a node ends, and its label begins."""
        return self.top(self.row[i]) + HEIGHT

    def edge(self, source: int, end: int, gaps: set[int]) -> str:
        """Draw an arrow: down past the label of its source, then from row to row in its lanes."""
        x, y = self.x[source], self.bottom(source)
        path = f"M{x:.1f},{y - self.inside(source, gaps):.1f}"
        for row, to in enumerate((*self.lanes[source, end], self.x[end]), start=self.row[source] + 1):
            stub, y = self.top(row) - GAP + STUB, self.top(row)
            middle = (stub + y) / 2
            path += f" V{stub:.1f} C{x:.1f},{middle + 3:.1f} {to:.1f},{middle - 3:.1f} {to:.1f},{y:.1f}"
            x = to
        y += self.inside(end, gaps)
        role = "se" if "se" in (self.nodes[source].role, self.nodes[end].role) and not gaps else "flow"
        if end in gaps:
            return f'<path class="{role}" d="{path} V{y:.1f}"/>'
        return arrow(role, f"{path} V{y:.1f}", x, y, down=True)

    def inside(self, i: int, gaps: set[int]) -> float:
        """Return how far within its row a node ends: a join is smaller than a box, and an arrow continues in a gap."""
        return HEIGHT / 2 if i in gaps else HEIGHT / 2 - RADIUS if self.nodes[i].role == "join" else 0.0

    def node(self, i: int) -> str:
        node, x, y = self.nodes[i], self.x[i], self.top(self.row[i])
        tip = ", ".join([*node.lines, node.shape])
        if node.role == "join":
            return join(x, y + HEIGHT / 2, node.lines[0], tip)
        return box(node.role, x - self.width / 2, y, self.width, HEIGHT, node.lines, tip)
