"""The retrofitted network as text: the graph of the whole network at the level of its blocks, or that of one block."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx.node import map_arg

from ..plan import Site
from ..surgery.splice.undo import is_retrofitted
from ..tables import Name, aligned
from .blocks import BlockPair, class_name, describe
from .inspected import Inspected
from .lines import Line
from .network import Node, network_of


def network_lines(found: Inspected) -> list[Line]:
    """Return the blocks of an inspected model and what is between them, as lines."""
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
    header, *lines = (Line(text, mark) for text, mark in zip(aligned(rows), marks, strict=True))
    return [Line(class_name(found.model), style="bold"), Line(""), Line(header.text, style="bold"), *lines]


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


def headline(pair: BlockPair) -> list[Line]:
    """Return lines with the name of a block, and where SE is in it."""
    lines = [Line(f"{pair.path or '(model)'}: {pair.cls}, {pair.kind}", style="bold")]
    for site in pair.sites:
        before = pair.se_before(site)
        lines.append(Line(_site_words(pair, site) + (f", before {before}" if before else ""), se=True))
    return lines


def block_lines(pair: BlockPair) -> list[Line]:
    """Return the graph of one block as a table."""
    lines = headline(pair)
    if pair.calls > 1:
        lines.append(Line(f"called {pair.calls} times in a forward; the shapes are the first call's"))
    rows, marks = [["opcode", "name", "target", "args", "module", "output"]], [False]
    for node in pair.after.graph.nodes:
        module = node.meta.get("module")
        target = pair.after.kind(node) if node.op == "call_function" else str(node.target)
        arguments = ", ".join([*(_text(a) for a in node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
        rows.append([node.op, node.name, target, arguments, describe(module) if module else "", pair.after.shape(node)])
        marks.append(is_retrofitted(module))
    header, *texts = aligned(rows)
    return [
        *lines,
        Line(""),
        Line(header, style="bold"),
        *(Line(text, mark) for text, mark in zip(texts, marks[1:], strict=True)),
    ]


def _text(argument: Any) -> str:
    return str(map_arg(argument, lambda n: Name(n.name)))
