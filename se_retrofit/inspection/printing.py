"""The retrofitted network as text: the graph of the whole network at the level of its blocks, or that of one block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.fx.node import map_arg

from ..plan import Site
from ..surgery.splice.undo import is_retrofitted
from ..tables import Name, aligned
from .blocks import BlockPair, Inspected, class_name, describe
from .network import Node, network_of


def network_lines(found: Inspected) -> list[str]:
    """Return the blocks of an inspected model and what is between them, as lines with marks in the margin."""
    names: dict[Node, str] = {}
    seen: Counter[str] = Counter()
    rows = [["name", "module", "output", "takes"]]
    nodes = network_of(found).nodes
    for before, node in zip([None, *nodes], nodes, strict=False):
        seen[node.name] += 1
        names[node] = node.name if seen[node.name] == 1 else f"{node.name} ({seen[node.name]})"
        taken = [names[source] for source in node.taken] if node.taken not in ([], [before]) else []
        few = ", ".join(taken) if len(taken) <= 3 else f"{taken[0]} .. {taken[-1]}: {len(taken)}"
        last = node.last.rpartition(".")[2] if node.last not in ("", node.name) else ""
        name = names[node] + (f" .. {last}" if last else "")
        rows.append([name, _words(node), "x".join(map(str, node.shape)), few])
    marks = [False, *(bool(node.ses) for node in nodes)]
    return [f"  {class_name(found.model)}", "", *_marked(aligned(rows), marks)]


def _marked(texts: Iterable[str], marks: Iterable[bool]) -> list[str]:
    """Return lines with a margin, in which those about SE are marked."""
    return [("> " if mark else "  ") + text for text, mark in zip(texts, marks, strict=True)]


def _words(node: Node) -> str:
    """Describe the classes of a node's modules, and the SE in it."""
    pair = node.block
    if pair is None or not node.ses:
        return node.words
    if len(pair.sites) == 1:
        if node.name == pair.sites[0].path:  # the network itself is the block
            return _site_words(pair, pair.sites[0])
        return f"{node.words}, {_site_words(pair, pair.sites[0])}"
    ses = Counter(describe(pair.root.get_submodule(site.path)) for site in pair.sites)
    return ", ".join([node.words, *(f"{number} x {words}" for words, number in ses.items())])


def _site_words(pair: BlockPair, site: Site) -> str:
    return f"{describe(pair.root.get_submodule(site.path))} after {pair.se_after(site)}"


def headline(pair: BlockPair) -> tuple[str, list[str]]:
    """Return the name of a block with its class and kind, and where each SE is in it."""
    places = []
    for site in pair.sites:
        before = pair.se_before(site)
        places.append(_site_words(pair, site) + (f", before {before}" if before else ""))
    return f"{pair.path or '(model)'}: {pair.cls}, {pair.kind}", places


def block_lines(pair: BlockPair) -> list[str]:
    title, places = headline(pair)
    lines = [f"  {title}", *(f"> {place}" for place in places)]
    if pair.calls > 1:
        lines.append(f"  called {pair.calls} times in a forward; the shapes are the first call's")
    rows, marks = [["opcode", "name", "target", "args", "module", "output"]], [False]
    for node in pair.after.graph.nodes:
        module = node.meta.get("module")
        target = pair.after.kind(node) if node.op == "call_function" else str(node.target)
        arguments = ", ".join([*(_text(a) for a in node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
        rows.append([node.op, node.name, target, arguments, describe(module) if module else "", pair.after.shape(node)])
        marks.append(is_retrofitted(module))
    return [*lines, "", *_marked(aligned(rows), marks)]


def _text(argument: Any) -> str:
    return str(map_arg(argument, lambda n: Name(n.name)))
