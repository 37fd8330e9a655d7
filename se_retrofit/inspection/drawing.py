"""Pictures of the blocks before and after, side by side, by Graphviz."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from torch import fx, nn

from ..errors import RetrofitError, extra
from ..paths import writable
from ..surgery.splice.undo import is_retrofitted
from .blocks import BlockGraph, BlockPair, class_name, describe, is_getitem
from .graphs import Recorded

with extra("inspect"):
    import graphviz

__all__ = ["check_target", "drawing_of", "has_graphviz", "sides_of", "write"]

FORMATS = ("svg", "png", "pdf")
TEXT_SUFFIXES = (".dot", ".gv")
INSTALL = "apt install graphviz, brew install graphviz, conda install graphviz or winget install graphviz"

_FONT = "Helvetica,Arial,sans-serif"
# light fills by what a node does, so that conv-norm-act can be told at a glance; SE is the only strong colour
_FILLS = {"conv": "#dbeafe", "norm": "#eef2f7", "act": "#e3f4e1", "pool": "#efe7fb", "other": "#ffffff"}
_SE_FILL, _SE_LINE = "#ff9f43", "#c2410c"
_JOINS = ("+", "+=", "*", "*=", "-", "cat", "concat")


def write(found: Recorded, groups: Iterable[list[BlockPair]], path: Path) -> Path:
    """Write the drawing of some groups of blocks, in the format that the suffix says."""
    drawing = drawing_of(found, groups)
    if path.suffix in TEXT_SUFFIXES:
        path.write_text(drawing.source, encoding="utf-8")
    else:
        path.write_bytes(_render(drawing, path.suffix[1:]))
    return path


def has_graphviz() -> bool:
    """Whether Graphviz's program ``dot`` is installed."""
    return shutil.which("dot") is not None


def check_target(path: str | Path) -> Path:
    """The path of a drawing, once it is clear that it can be made there."""
    path = Path(path)
    if path.suffix not in (*TEXT_SUFFIXES, *(f".{f}" for f in FORMATS)):
        raise RetrofitError(
            f"{path} ends in no format that can be drawn: .dot, .gv, {', '.join(f'.{f}' for f in FORMATS)}"
        )
    writable(path)
    if path.suffix not in TEXT_SUFFIXES and not has_graphviz():
        raise RetrofitError(
            f"{path.suffix} needs Graphviz's program dot, which is not on the PATH: install it ({INSTALL}), "
            "or give a path that ends in .dot"
        )
    return path


def _canvas() -> graphviz.Digraph:
    drawing = graphviz.Digraph("retrofit")
    drawing.attr(
        fontname=_FONT, fontsize="13", rankdir="TB", nodesep="0.25", ranksep="0.3", labelloc="t", bgcolor="white"
    )
    drawing.attr(
        "node",
        fontname=_FONT,
        fontsize="11",
        shape="box",
        style="rounded,filled",
        color="#94a3b8",
        height="0.3",
        margin="0.12,0.06",
    )
    drawing.attr("edge", fontname=_FONT, fontsize="9", fontcolor="#64748b", color="#64748b", arrowsize="0.6")
    return drawing


def drawing_of(found: Recorded, groups: Iterable[list[BlockPair]]) -> graphviz.Digraph:
    """The first block of each group, before and after."""
    drawing, plan = _canvas(), found.plan
    title = f"{class_name(found.model)}: {len(plan.sites)} SE modules, {plan.parameters:,} parameters more\\n "
    drawing.attr(label=title, fontsize="18")
    for number, group in enumerate(groups):
        pair = group[0]
        with drawing.subgraph(name=f"cluster_{number}") as cluster:
            cluster.attr(
                label=graphviz.escape(_caption(group)), style="rounded", color="#cbd5e1", fontsize="13", margin="14"
            )
            # Graphviz sets unconnected clusters from right to left
            for word in ("after", "before"):
                with cluster.subgraph(name=f"cluster_{number}_{word}") as side:
                    side.attr(
                        label=word,
                        style="rounded,filled",
                        fillcolor="#f8fafc",
                        color="#e2e8f0",
                        fontsize="12",
                        margin="10",
                    )
                    if pair.failure is not None:
                        side.node(f"{number}_{word}", f"no graph: {pair.failure}", shape="plaintext")
                    else:
                        _draw_side(side, pair, word, f"{number}_{word}_")
    return drawing


def sides_of(pair: BlockPair) -> list[str]:
    """A block before and after, as two ``<svg>`` elements of one size, whose nodes are in line. Their nodes have classes for what
    they do, by which a page can colour them."""
    texts, sizes = [], []
    for word in ("before", "after"):
        drawing = _canvas()
        drawing.attr(bgcolor="transparent")
        _draw_side(drawing, pair, word, f"{word}_")
        text = _render(drawing, "svg").decode()
        # ids are unique within a drawing, not within the page
        texts.append(re.sub(r' id="[^"]*"', "", text[text.index("<svg") :]))
        sizes.append([float(n) for n in re.findall(r'viewBox="\S+ \S+ (\S+) (\S+)"', text)[0]])
    width, height = (max(size) for size in zip(*sizes, strict=True))
    sides = []
    for text, (own, _) in zip(texts, sizes, strict=True):
        size = f'width="{width:.0f}pt" height="{height:.0f}pt"'
        box = f'viewBox="{(own - width) / 2:.2f} 0 {width:.2f} {height:.2f}"'
        text = re.sub(r'width="[^"]*" height="[^"]*"\s+viewBox="[^"]*"', f"{size} {box}", text, count=1)
        sides.append(text)
    return sides


def _render(drawing: graphviz.Digraph, form: str) -> bytes:
    try:
        return drawing.pipe(format=form)
    except (graphviz.ExecutableNotFound, subprocess.CalledProcessError, OSError) as error:
        raise RetrofitError(f"Graphviz could not draw: {str(error).strip()}") from error


def _caption(group: list[BlockPair]) -> str:
    pair = group[0]
    text = f"{pair.path or '(model)'}: {pair.cls}, {pair.kind}"
    others = [other.path for other in group[1:]]
    if others:
        few = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        text += f"\nlike it: {few}"
    return text


def _draw_side(drawing: graphviz.Digraph, pair: BlockPair, word: str, prefix: str) -> None:
    """A block before or after. Before, there is a gap where SE will be, so that the nodes of the two are in line."""
    assert pair.before is not None
    assert pair.after is not None
    block, nodes = pair.after, {node: node for node in pair.after.graph.nodes}
    if word == "before":
        ses = set(pair.after.ses)
        rest = [node for node in nodes if node not in ses]
        block = pair.before
        if len(rest) == len(block.graph.nodes):
            nodes = dict(zip(rest, block.graph.nodes, strict=True))
        else:
            nodes = {node: node for node in block.graph.nodes}
    _draw_block(drawing, block, nodes, prefix)


def _draw_block(drawing: graphviz.Digraph, block: BlockGraph, nodes: dict[fx.Node, fx.Node], prefix: str) -> None:
    """Draw some nodes as connected as they are, each as the node of the block that it is mapped to, or as a gap."""
    given = block.graph.find_nodes(op="placeholder")
    several = given if len(given) > 2 else []  # a list of feature maps is drawn as one input
    labelled: set[fx.Node] = set()
    order = next(iter(nodes)).graph.nodes
    for place in order:
        node = nodes.get(place)
        if is_getitem(place) or (node is not None and node in several[1:]):
            continue
        if node is None:
            drawing.node(prefix + place.name, " \n ", style="invis")
        else:
            _draw_node(drawing, block, node, prefix + place.name)
        flowing: dict[fx.Node, list[str]] = {}
        for source in place.all_input_nodes:
            made = nodes.get(source)
            origin = (
                next(p for p in order if nodes.get(p) is several[0]) if made is not None and made in several else source
            )
            while is_getitem(origin):  # an arrow from all that an operation returned, with the shape of the part
                origin = origin.all_input_nodes[0]
            shape = block.shape(made if made is not None else nodes[source.all_input_nodes[0]])
            flowing.setdefault(origin, []).append(shape.replace("x", "\u00d7"))
        for origin, shapes in flowing.items():
            # a skip carries what another arrow says already, and its label would lie far from both of its ends
            known = origin in labelled and node is not None and block.kind(node) in _JOINS
            labelled.add(origin)
            # out of a gap, where the label has been before, its place is kept
            label = (
                ""
                if known
                else " "
                if nodes.get(origin) is None
                else f" {', '.join(shapes[:2])}{', ...' if len(shapes) > 2 else ''} "
            )
            ends = [nodes.get(origin), node]
            drawing.edge(prefix + origin.name, prefix + place.name, label=label, **_edge_style(block, ends))


def _edge_style(block: BlockGraph, ends: list[fx.Node | None]) -> dict[str, str]:
    """How the edge between two nodes looks; None is a gap, through which it goes on."""
    if any(is_retrofitted(end.meta.get("module")) for end in ends if end is not None):
        return {"class": "se", "color": _SE_LINE, "penwidth": "1.8", "fontcolor": _SE_LINE}
    if ends[1] is None:
        return {"headclip": "false", "arrowhead": "none"}
    return {"tailclip": "false"} if ends[0] is None else {}


def _draw_node(drawing: graphviz.Digraph, block: BlockGraph, node: fx.Node, name: str) -> None:
    module, kind = node.meta.get("module"), block.kind(node)
    if is_retrofitted(module):
        label = f"{describe(module)}\n{block.path(str(node.target))}".replace("->", "→")
        style = {"fillcolor": _SE_FILL, "color": _SE_LINE, "penwidth": "2", "fontname": "Helvetica-Bold"}
        drawing.node(name, graphviz.escape(label), **{"class": "se"}, **style)
    elif module is not None:
        label = f"{block.path(str(node.target))}\n{describe(module)}".replace("->", "→")
        role = _role(module, kind)
        drawing.node(name, graphviz.escape(label), fillcolor=_FILLS[role], **{"class": role})
    elif node.op in ("placeholder", "output"):
        words = f"input {node.name}" if node.op == "placeholder" else "output"
        drawing.node(name, graphviz.escape(words), shape="oval", fillcolor="#ffffff", **{"class": "other"})
    elif kind in _JOINS:
        symbol = {"+=": "+", "*": "\u00d7", "*=": "\u00d7", "concat": "cat"}.get(kind, kind)
        style = {"shape": "circle", "fontsize": "14", "margin": "0.02", "height": "0.36", "width": "0.36"}
        drawing.node(name, symbol, fillcolor="#fde68a", **{"class": "join"}, **style)
    elif node.op == "get_attr":
        label = str(node.target)
        drawing.node(
            name, graphviz.escape(label), style="filled", fillcolor="#f1f5f9", fontsize="10", **{"class": "other"}
        )
    else:
        role = _role(None, kind)
        drawing.node(name, graphviz.escape(kind), fillcolor=_FILLS[role], **{"class": role})


def _role(module: nn.Module | None, kind: str) -> str:
    """What a node does, by its class's name: only for its colour."""
    low = kind.lower()
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or "conv" in low:
        return "conv"
    for role, words in (
        ("norm", ("norm",)),
        ("act", ("relu", "elu", "silu", "swish", "sigmoid", "mish")),
        ("pool", ("pool",)),
    ):
        if any(word in low for word in words):
            return role
    return "other"
