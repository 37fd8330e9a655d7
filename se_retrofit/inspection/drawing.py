"""Pictures of the blocks before and after, side by side, by Graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import fx, nn

from ..attention import SEAttention
from ..errors import RetrofitError, extra
from ..paths import writable
from .graphs import BlockGraph, BlockPair, Inspection, describe, find_block, inspect_model

with extra("inspect"):
    import graphviz

__all__ = ["draw", "drawing_of", "has_graphviz", "svg_of"]

FORMATS = ("svg", "png", "pdf")
TEXT_SUFFIXES = (".dot", ".gv")
INSTALL = "apt install graphviz, brew install graphviz, conda install graphviz or winget install graphviz"

_FONT = "Helvetica,Arial,sans-serif"
# light fills by what a node does, so that conv-norm-act can be told at a glance; SE is the only strong colour
_FILLS = {"conv": "#dbeafe", "norm": "#eef2f7", "act": "#e3f4e1", "pool": "#efe7fb", "other": "#ffffff"}
_SE_FILL, _SE_LINE = "#ff9f43", "#c2410c"
_JOINS = ("+", "+=", "*", "*=", "-", "cat", "concat")


def draw(model: nn.Module, path: str | Path, block: str | None = None, *, example_inputs: Any = None) -> Path:
    """Draw each distinct block of a retrofitted model before and after, with the shapes on the edges and SE in orange.

    Blocks that differ in nothing but names and numbers of channels are drawn once; the first one's shapes are shown.

    Args:
        model: a model that ``add_se`` has retrofitted; it is not touched.
        path: the file to write. Its suffix says what: ``.dot`` or ``.gv`` (Graphviz's text, needs nothing), ``.svg``,
            ``.png`` or ``.pdf`` (by Graphviz's program ``dot``).
        block: path of the one block to draw; None for all that are distinct.
        example_inputs: a tensor or a tuple of positional inputs, for the shapes; without it, as in ``add_se``.

    Returns:
        The path that was written.

    Raises:
        RetrofitError: the suffix is none of these, the folder does not exist, Graphviz is not installed and the suffix
            asks for it, the model has no SE that ``add_se`` put in or no such block, or it can't be run on the inputs.
            Nothing is written then.
        TypeError: it is no model, or the inputs are neither a tensor nor a tuple.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, draw
        >>> path = draw(add_se(timm.create_model("resnet18")), f"{tempfile.mkdtemp()}/resnet18.dot")
        >>> path.read_text().startswith("digraph")
        True
    """
    path = check_target(path)
    inspection = inspect_model(model, example_inputs)
    groups = inspection.distinct() if block is None else [[find_block(inspection, block)]]
    return write(inspection, groups, path)


def write(inspection: Inspection, groups: Iterable[list[BlockPair]], path: Path) -> Path:
    """Write the drawing of some groups of blocks, in the format that the suffix says."""
    drawing = drawing_of(inspection, groups)
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


def drawing_of(inspection: Inspection, groups: Iterable[list[BlockPair]], title: bool = True) -> graphviz.Digraph:
    """The first block of each group, before and after; without ``title``, nothing says which blocks they are."""
    drawing = graphviz.Digraph("retrofit")
    drawing.attr(
        fontname=_FONT, fontsize="13", rankdir="TB", nodesep="0.25", ranksep="0.3", labelloc="t", bgcolor="white"
    )
    if title:
        plan = inspection.plan
        name = type(inspection.model).__name__
        drawing.attr(
            label=f"{name}: {len(plan.sites)} SE modules, {plan.parameters:,} parameters more\\n ", fontsize="18"
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
    for number, group in enumerate(groups):
        pair = group[0]
        with drawing.subgraph(name=f"cluster_{number}") as cluster:
            if title:
                cluster.attr(
                    label=graphviz.escape(_caption(group)), style="rounded", color="#cbd5e1", fontsize="13", margin="14"
                )
            else:
                cluster.attr(peripheries="0")
            # Graphviz sets unconnected clusters from right to left
            for word, block in (("after", pair.after), ("before", pair.before)):
                with cluster.subgraph(name=f"cluster_{number}_{word}") as side:
                    side.attr(
                        label=word,
                        style="rounded,filled",
                        fillcolor="#f8fafc",
                        color="#e2e8f0",
                        fontsize="12",
                        margin="10",
                    )
                    if block is None:
                        side.node(f"{number}_{word}", f"no graph: {pair.failure}", shape="plaintext")
                    else:
                        _draw_block(side, block, f"{number}_{word}_")
    return drawing


def svg_of(drawing: graphviz.Digraph) -> str:
    """A drawing as an ``<svg>`` element."""
    text = _render(drawing, "svg").decode()
    return text[text.index("<svg") :]


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


def _draw_block(drawing: graphviz.Digraph, block: BlockGraph, prefix: str) -> None:
    given = block.graph.find_nodes(op="placeholder")
    several = given if len(given) > 2 else []  # a list of feature maps is drawn as one input
    labelled: set[fx.Node] = set()
    for node in block.graph.nodes:
        if node in several[1:]:
            continue
        name = prefix + node.name
        _draw_node(drawing, block, node, name)
        shapes: dict[fx.Node, list[str]] = {}
        for source in node.all_input_nodes:
            origin = several[0] if source in several else source
            shapes.setdefault(origin, []).append(block.shape(source).replace("x", "\u00d7"))
        for origin, flowing in shapes.items():
            shape = ", ".join(flowing[:2]) + (", ..." if len(flowing) > 2 else "")
            touches_se = isinstance(block.modules.get(node), SEAttention) or isinstance(
                block.modules.get(origin), SEAttention
            )
            style = {"color": _SE_LINE, "penwidth": "1.8", "fontcolor": _SE_LINE} if touches_se else {}
            # a skip carries what another arrow says already, and its label would lie far from both of its ends
            label = "" if origin in labelled and block.kind(node) in _JOINS else f" {shape} "
            labelled.add(origin)
            drawing.edge(prefix + origin.name, name, label=label, **style)


def _draw_node(drawing: graphviz.Digraph, block: BlockGraph, node: fx.Node, name: str) -> None:
    module, kind = block.modules.get(node), block.kind(node)
    if isinstance(module, SEAttention):
        label = f"{describe(module)}\n{node.target}".replace("->", "→")
        drawing.node(
            name, graphviz.escape(label), fillcolor=_SE_FILL, color=_SE_LINE, penwidth="2", fontname="Helvetica-Bold"
        )
    elif module is not None:
        label = f"{node.target}\n{describe(module)}".replace("->", "→")
        drawing.node(name, graphviz.escape(label), fillcolor=_FILLS[_role(module, kind)])
    elif node.op in ("placeholder", "output"):
        words = f"input {node.name}" if node.op == "placeholder" else "output"
        drawing.node(name, graphviz.escape(words), shape="oval", fillcolor="#ffffff")
    elif kind in _JOINS:
        symbol = {"+=": "+", "*": "\u00d7", "*=": "\u00d7", "concat": "cat"}.get(kind, kind)
        drawing.node(
            name, symbol, shape="circle", fillcolor="#fde68a", fontsize="14", margin="0.02", height="0.36", width="0.36"
        )
    elif node.op == "get_attr":
        drawing.node(name, graphviz.escape(str(node.target)), style="filled", fillcolor="#f1f5f9", fontsize="10")
    else:
        drawing.node(name, graphviz.escape(kind), fillcolor=_FILLS[_role(None, kind)])


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
