"""The layered layout of a graph drawn from top to bottom, by Sugiyama, Tagawa and Toda (1981).

Nodes are assigned to layers such that each edge leads down; an edge that spans several layers gets a lane in each that
it passes; each layer is ordered to have few crossings; finally, nodes are aligned where possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LANE, GAP, MARGIN = 10, 22, 1  # width of an edge's lane; gap between neighbours in a layer, and at both sides
SWEEPS = 12

Edge = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The centre and the layer (from 0 at the top) of each node, where each edge passes other layers, and the width."""

    x: list[float]
    row: list[int]
    lanes: dict[Edge, list[float]]
    width: float


def layered(widths: Sequence[float], edges: Sequence[Edge]) -> Layout:
    """Lay out a graph whose nodes have these widths, and whose edges lead from earlier nodes to later ones."""
    row = _rows(len(widths), edges)
    grid = _Grid(list(widths), row.copy())
    chains = {edge: grid.chain(edge) for edge in edges}
    layers = grid.ordered()
    x = grid.placed(layers)
    left = min(x[i] - width / 2 for i, width in enumerate(grid.widths)) - MARGIN
    right = max(x[i] + width / 2 for i, width in enumerate(grid.widths)) + MARGIN
    x = [value - left for value in x]
    lanes = {edge: [x[lane] for lane in chain[1:-1]] for edge, chain in chains.items()}
    return Layout(x[: len(widths)], row, lanes, right - left)


def _rows(number: int, edges: Sequence[Edge]) -> list[int]:
    """Return the layer of each node: below its last source; without sources, above the first node that uses it."""
    row = [0] * number
    for source, end in sorted(edges, key=lambda edge: edge[1]):
        row[end] = max(row[end], row[source] + 1)
    ends = {end for _, end in edges}
    for source in set(range(1, number)) - ends:
        row[source] = max(0, min((row[end] for start, end in edges if start == source), default=1) - 1)
    return row


class _Grid:
    """The items in the layers: the nodes, followed by the lanes of long edges, which the edges of one node share."""

    def __init__(self, widths: list[float], row: list[int]) -> None:
        self.nodes = len(widths)
        self.widths = widths
        self.row = row
        self.shared: dict[Edge, int] = {}
        self.links: dict[Edge, None] = {}

    def chain(self, edge: Edge) -> list[int]:
        """Return the items that an edge passes through."""
        source, end = edge
        chain = [source]
        for row in range(self.row[source] + 1, self.row[end]):
            if (source, row) not in self.shared:
                self.shared[source, row] = len(self.row)
                self.row.append(row)
                self.widths.append(LANE)
            chain.append(self.shared[source, row])
        chain.append(end)
        self.links.update(dict.fromkeys(pairwise(chain)))
        return chain

    def neighbours(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the items that each item is linked with above and below."""
        above: list[list[int]] = [[] for _ in self.row]
        below: list[list[int]] = [[] for _ in self.row]
        for upper, lower in self.links:
            below[upper].append(lower)
            above[lower].append(upper)
        return above, below

    def ordered(self) -> list[list[int]]:
        """Return the layers in the best order of several sweeps, which sort items by the mean place of links."""
        layers: list[list[int]] = [[] for _ in range(max(self.row) + 1)]
        for item, row in enumerate(self.row):
            layers[row].append(item)
        above, below = self.neighbours()
        best, fewest = [layer.copy() for layer in layers], self.crossings(layers)
        for sweep in range(SWEEPS):
            if not fewest:
                break
            linked = (above, below)[sweep % 2]
            for layer in layers if sweep % 2 == 0 else reversed(layers):
                place = {item: i for other in layers for i, item in enumerate(other)}
                means = {i: sum(place[n] for n in linked[i]) / len(linked[i]) for i in layer if linked[i]}
                layer.sort(key=lambda item, means=means, place=place: means.get(item, place[item]))  # type: ignore[misc]
            crossings = self.crossings(layers)
            if crossings < fewest:
                best, fewest = [layer.copy() for layer in layers], crossings
        return best

    def crossings(self, layers: list[list[int]]) -> int:
        """Return the number of pairs of links that cross."""
        place = {item: i for layer in layers for i, item in enumerate(layer)}
        by_row: dict[int, list[Edge]] = {}
        for upper, lower in self.links:
            by_row.setdefault(self.row[upper], []).append((place[upper], place[lower]))
        return sum(
            (a[0] - b[0]) * (a[1] - b[1]) < 0
            for links in by_row.values()
            for i, a in enumerate(links)
            for b in links[:i]
        )

    def placed(self, layers: list[list[int]]) -> list[float]:
        """Return the centres of all items, by Brandes and Koepf (2001): aligned items are moved as far to one side as
        possible, from above and below, to the left and right; the result is the mean of the middle two of the four."""
        runs = []
        for down in (True, False):
            for side in (1, -1):
                turned = [layer[::side] for layer in layers[:: 1 if down else -1]]
                x = self.pushed(turned, self.in_line(turned, down))
                runs.append([side * value for value in x])
        spans = [(min(run), max(run)) for run in runs]
        left, right = min(spans, key=lambda span: span[1] - span[0])
        for i, (low, high) in enumerate(spans):  # align all of them to the sides of the narrowest
            runs[i] = [value + (right - high if i % 2 else left - low) for value in runs[i]]
        return [sum(sorted(places)[1:3]) / 2 for places in zip(*runs, strict=True)]

    def in_line(self, layers: list[list[int]], down: bool) -> list[int]:
        """Return for each item the first item that it is aligned with. An item is aligned with the middle one of its
        links in the previous layer if that is free and no line is crossed; with lanes only if it has no other links."""
        above, below = self.neighbours()
        before, behind = (above, below) if down else (below, above)
        place = {item: i for layer in layers for i, item in enumerate(layer)}
        first, taken = list(range(len(self.row))), set[int]()
        for layer in layers[1:]:
            last = -1
            for item in layer:
                near = sorted(_nodes_first(before[item], self.nodes, item), key=place.__getitem__)
                for other in near[(len(near) - 1) // 2 : len(near) // 2 + 1]:
                    wants = item in _nodes_first(behind[other], self.nodes, other)
                    if wants and other not in taken and place[other] > last:
                        first[item], last = first[other], place[other]
                        taken.add(other)
                        break
        return first

    def pushed(self, layers: list[list[int]], first: list[int]) -> list[float]:
        """Return the centres of all items, as far to the left as possible, with aligned items at the same position."""
        x = [0.0] * len(first)
        moved = True
        while moved:
            moved = False
            for left, item in (pair for layer in layers for pair in pairwise(layer)):
                least = x[first[left]] + (self.widths[left] + self.widths[item]) / 2 + GAP
                if x[first[item]] < least:
                    x[first[item]], moved = least, True
        return [x[i] for i in first]


def _nodes_first(linked: list[int], nodes: int, item: int) -> list[int]:
    """Return the nodes among an item's links; or its lanes, if there are no nodes or the item is a lane itself."""
    return [i for i in linked if i < nodes] or linked if item < nodes else linked
