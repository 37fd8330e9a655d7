"""The picture of a whole network: a column for each stage, with blocks as boxes that link to their drawings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .network import Edge, Network, Node
from .svg import BOLD, RADIUS, Picture, arrow, badge_width, box, join, text, times

_WIDTH, _HEIGHT, _PITCH = 156, 34, 46  # width and height of a box; distance from one box to the next
_GUTTER, _LANE = 40, 9  # between columns; between connections that pass boxes
_HEAD = 30  # height of a column's heading
_MANY = 3  # a node with more skip connections than this belongs to a dense block

_Places = Mapping[Node, tuple[int, int]]  # the column and the row of each node


@dataclass(frozen=True)
class _Arc:
    """A connection within a column, in one of the lanes to the left of its boxes. A ``rail`` belongs to a dense block,
    and has a branch to each of its layers."""

    first: int
    last: int
    lane: int
    rail: bool


@dataclass(eq=False)
class _Column:
    nodes: list[Node]
    space: tuple[int, ...]
    arcs: Sequence[_Arc] = ()
    x: float = 0
    y: float = 0

    @property
    def height(self) -> float:
        return len(self.nodes) * _PITCH


def picture(network: Network, links: Mapping[str, str]) -> Picture:
    """Draw a network; ``links`` holds the link target of each block's box, by the path of the block."""
    columns = _columns(network.nodes)
    where = {node: (i, row) for i, column in enumerate(columns) for row, node in enumerate(column.nodes)}
    for i, column in enumerate(columns):
        column.arcs = _arcs(i, column, network.edges, where)
    width, height = _place(columns, network.edges, where)
    parts = [_edge(edge, columns, where) for edge in network.edges]
    parts += (_arc(arc, column) for column in columns for arc in column.arcs)
    for column in columns:
        parts.append(text("name", column.x, column.y - 12, times(column.space) or "vector"))
        parts += (_box(node, column, row, links) for row, node in enumerate(column.nodes))
    return Picture(width, height, tuple(parts))


def _columns(nodes: Iterable[Node]) -> list[_Column]:
    """Group neighbours whose feature maps have the same size."""
    columns: list[_Column] = []
    for node in nodes:
        space = () if all(size == 1 for size in node.space) else node.space
        if not columns or columns[-1].space != space:
            columns.append(_Column([], space))
        columns[-1].nodes.append(node)
    first = columns[0]
    if len(first.nodes) == 1 and len(columns) > 1:  # the input alone is not a stage
        columns[1].nodes.insert(0, first.nodes[0])
        columns.pop(0)
    return columns


def _arcs(number: int, column: _Column, edges: Iterable[Edge], where: _Places) -> list[_Arc]:
    """Return the connections within a column that pass boxes, the shortest ones in the lanes next to the boxes."""
    dense = {node for node in column.nodes if sum(e.skips for e in edges if e.end is node) > _MANY}
    spans: list[tuple[int, int]] = []
    rails: list[tuple[int, int]] = []
    for edge in edges:
        (i, first), (j, last) = where[edge.source], where[edge.end]
        if i != number or j != number or last - first < 2:
            continue
        if edge.end not in dense:
            spans.append((first, last))
        elif rails and first < rails[-1][1]:
            rails[-1] = min(first, rails[-1][0]), max(last, rails[-1][1])
        else:
            rails.append((first, last))
    # the first layers of a dense block, which take few values, also belong to its rail
    spans = [s for s in spans if not any(rail[0] <= s[0] and s[1] <= rail[1] for rail in rails)]
    arcs: list[_Arc] = []
    for first, last in sorted(spans + rails, key=lambda span: span[1] - span[0]):
        taken = {arc.lane for arc in arcs if arc.first < last and first < arc.last}
        lane = next(n for n in range(len(taken) + 1) if n not in taken)
        arcs.append(_Arc(first, last, lane, (first, last) in rails))
    return arcs


def _place(columns: list[_Column], edges: Iterable[Edge], where: _Places) -> tuple[float, float]:
    """Set the positions of the columns, and return the total size. If connections skip whole stages, as in a U-Net,
    smaller feature maps are placed lower, so that these connections pass above them."""
    across = any(where[e.end][0] - where[e.source][0] > 1 for e in edges)
    tops: dict[tuple[int, ...], float] = {}
    if across:
        y = 0.0
        for space in sorted({c.space for c in columns if c.space}, reverse=True):
            tops[space] = y
            y += max(c.height for c in columns if c.space == space) + _HEAD
    x, y = 10.0, 0.0
    for column in columns:
        y = tops.get(column.space, y if across else 0.0)
        column.x = x + max((arc.lane + 1 for arc in column.arcs), default=0) * _LANE + 12
        column.y = y + _HEAD
        x = column.x + _WIDTH + _GUTTER
    return x - _GUTTER + 10, max(c.y + c.height for c in columns) + 6


def _box(node: Node, column: _Column, row: int, links: Mapping[str, str]) -> str:
    x, y = column.x, column.y + row * _PITCH
    shape = times(node.shape)
    told = [node.name + (f" to {node.last}" if node.last not in ("", node.name) else ""), node.words, shape]
    tip = ", ".join(part for part in told if part)
    if node.kind == "join":
        return join(x + _WIDTH / 2, y + _HEIGHT / 2, node.name, tip)
    mark = "" if not node.ses else "SE" if node.ses == 1 else f"{node.ses} SE"
    room = int((_WIDTH - 18 - badge_width(mark)) / BOLD)
    words = node.words if "," not in node.words else f"{node.words.count(',') + 1} layers"
    if len(node.shape) == len(node.space) + 1 and node.space == column.space != ():
        shape = str(math.prod(node.shape) // max(math.prod(node.space), 1))  # the heading has the rest
    most = room + 5 - len(shape) - 3
    words = words if len(words) <= most else f"{words[: most - 1]}\u2026"
    lines = [_name(node, room - bool(mark)), f"{words} \u00b7 {shape}" if words else shape]
    bypass = f'<path class="skip" d="M{x},{y + 4} h-4 q-5,0 -5,5 v{_HEIGHT - 18} q0,5 5,5 h4"/>' if node.bypass else ""
    drawn = bypass + box(node.kind, x, y, _WIDTH, _HEIGHT, lines, tip, mark)
    link = links.get(node.block.path) if node.block is not None else None
    return f'<a href="{escape(link)}">{drawn}</a>' if link else drawn


def _name(node: Node, most: int) -> str:
    """Return as much of the end of a node's name as there is room for."""
    end = "" if node.last in ("", node.name) else f" \u2013 {node.last.rpartition('.')[2]}"
    name = node.name
    while len(name) + len(end) > most and "." in name:
        name = name.partition(".")[2]
    whole = name + end
    return whole if len(whole) <= most else "\u2026" + whole[1 - most :]


def _edge(edge: Edge, columns: list[_Column], where: _Places) -> str:
    """Draw a connection between neighbours or between columns; those that pass neighbours are arcs."""
    (i, row), (j, end) = where[edge.source], where[edge.end]
    before, after = columns[i], columns[j]
    cls = "skip" if edge.skips else "flow"
    if i == j:
        if end - row != 1:
            return ""
        x, top, bottom = before.x + _WIDTH / 2, before.y + row * _PITCH, after.y + end * _PITCH + _top(edge.end)
        return arrow(cls, f"M{x:.0f},{top + _HEIGHT - _top(edge.source):.0f} V{bottom:.0f}", x, bottom, down=True)
    start, stop = before.x + _side(edge.source), after.x + _WIDTH - _side(edge.end)
    x1, x2 = before.x + _WIDTH, after.x
    y1, y2 = (c.y + r * _PITCH + _HEIGHT / 2 for c, r in ((before, row), (after, end)))
    curve = _curve(x1, y1, x2, y2)
    if passed := columns[i + 1 : j]:
        lane = _above(y1, passed)
        curve = f"{_curve(x1, y1, x1 + _GUTTER, lane)} {_curve(x2 - _GUTTER, lane, x2, y2)}"
    return arrow(cls, f"M{start:.0f},{y1:.0f} {curve} H{stop:.0f}", stop, y2)


def _curve(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return the part of a path from one point to another that begins and ends horizontally."""
    bend = _GUTTER * 0.7
    return f"H{x1:.0f} C{x1 + bend:.0f},{y1:.0f} {x2 - bend:.0f},{y2:.0f} {x2:.0f},{y2:.0f}"


def _above(y: float, columns: Iterable[_Column]) -> float:
    """Return the height at which a connection that starts at ``y`` passes columns: above those that are in its way."""
    for column in sorted(columns, key=lambda column: -column.y):
        if column.y - _HEAD < y < column.y + column.height:
            y = column.y - _HEAD + 1
    return y


def _arc(arc: _Arc, column: _Column) -> str:
    left = column.x - 14 - arc.lane * _LANE
    y1, y2 = (column.y + row * _PITCH + _HEIGHT / 2 for row in (arc.first, arc.last))
    rows = range(arc.first + 1, arc.last) if arc.rail else ()
    ticks = "".join(f"M{left:.0f},{column.y + row * _PITCH + _HEIGHT / 2:.0f} H{column.x:.0f} " for row in rows)
    ends = [column.x + (_WIDTH - _side(column.nodes[row])) % _WIDTH for row in (arc.first, arc.last)]
    path = f"M{ends[0]:.0f},{y1:.0f} H{left + 6:.0f} q-6,0 -6,6 V{y2 - 6:.0f} q0,6 6,6 H{ends[1]:.0f}"
    return arrow("skip", ticks + path, ends[1], y2)


def _side(node: Node) -> float:
    """Return the position of a node's right side; a join is a circle in the middle of its box."""
    return _WIDTH / 2 + RADIUS if node.kind == "join" else _WIDTH


def _top(node: Node) -> float:
    return _HEIGHT / 2 - RADIUS if node.kind == "join" else 0
