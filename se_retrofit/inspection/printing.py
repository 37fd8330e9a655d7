"""The retrofitted network as text: the tree of its modules, or one block's graph and code."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx.node import map_arg

from ..attention import Inserted
from ..surgery.splice.undo import is_retrofitted
from ..tables import aligned
from .blocks import BlockPair, class_name, describe, join
from .diff import sources
from .graphs import Recorded
from .lines import Line

__all__ = ["block_lines", "headline", "source_lines", "tree_lines"]


# The tree -------------------------------------------------------------------------------------------------------------


class _Tree:
    def __init__(self, found: Recorded) -> None:
        self.after = {site.path: pair.se_after(site) for pair in found.blocks for site in pair.sites}
        self.blocks = [pair.path for pair in found.blocks]
        self.printed: dict[Any, str] = {}
        self.keys: dict[tuple[int, bool], Any] = {}

    def key(self, module: nn.Module, sizes: bool) -> Any:
        """Equal for modules that are built the same, with or without their sizes."""
        known = self.keys.get((id(module), sizes))
        if known is None:
            children = (
                () if is_retrofitted(module) else tuple((n, self.key(m, sizes)) for n, m in module.named_children())
            )
            own = (describe(module), module.extra_repr() if not children else "") if sizes else class_name(module)
            known = self.keys[id(module), sizes] = (own, children)
        return known

    def ses(self, module: nn.Module) -> list[Inserted]:
        return [m for m in module.modules() if is_retrofitted(m)]

    def folds(self, module: nn.Module, path: str) -> bool:
        """Whether a module may be left to a reference to one printed before: a block may, but no part of a block that
        says where SE is, nor a stage, which holds little more than its blocks."""
        ses = len(self.ses(module))
        if not ses:
            return sum(1 for _ in module.modules()) >= 6
        if ses > 1 and isinstance(module, nn.Sequential):
            return False
        return path != "" and any(block == path or block.startswith(f"{path}.") for block in self.blocks)

    def reference(self, module: nn.Module, path: str) -> str | None:
        """Where a module like this one was printed, in words."""
        if not self.folds(module, path):
            return None
        if (same := self.printed.get(self.key(module, True))) is not None:
            return f"as {same}"
        if (like := self.printed.get(self.key(module, False))) is not None:
            return f"as {like}, other sizes"
        return None

    def lines(self, module: nn.Module, path: str, indent: int) -> Iterator[tuple[str, str, bool]]:
        children = list(module.named_children())
        while children:
            name, child = children.pop(0)
            child_path, pad = join(path, name), "  " * indent
            if is_retrofitted(child):
                after = self.after.get(child_path)
                yield pad + name, describe(child) + (f", after {after}" if after else ""), True
                continue
            reference = self.reference(child, child_path)
            if reference is None:
                self.printed.setdefault(self.key(child, True), child_path)
                self.printed.setdefault(self.key(child, False), child_path)
                yield pad + name, describe(child), False
                yield from self.lines(child, child_path, indent + 1)
                continue
            last, ses = name, self.sizes(child)
            while children:
                following, twin = children[0]
                if self.reference(twin, join(path, following)) != reference or self.sizes(twin) != ses:
                    break
                last = children.pop(0)[0]
            names = name if last == name else f"{name}-{last}" if last.isdigit() else f"{name} .. {last}"
            yield pad + names, ", ".join([class_name(child), reference, *ses]), bool(ses)

    def sizes(self, module: nn.Module) -> list[str]:
        """The SE modules in a module, in words."""
        counts = Counter(describe(se) for se in self.ses(module))
        return [f"with {number} x {words}" if number > 1 else f"with {words}" for words, number in counts.items()]


def tree_lines(found: Recorded) -> list[Line]:
    """The tree of an inspected model's modules."""
    tree = _Tree(found)
    rows = list(tree.lines(found.model, "", 1))
    texts = aligned([[name, words] for name, words, _ in rows])
    return [
        Line(class_name(found.model), style="bold"),
        *(Line(t, se) for t, (_, _, se) in zip(texts, rows, strict=True)),
    ]


# A block --------------------------------------------------------------------------------------------------------------


def headline(pair: BlockPair) -> list[Line]:
    """Which block, and where SE is in it."""
    lines = [Line(f"{pair.path or '(model)'}: {pair.cls}, {pair.kind}", style="bold")]
    for site in pair.sites:
        before = pair.se_before(site)
        words = f"{describe(pair.root.get_submodule(site.path))} after {pair.se_after(site)}"
        lines.append(Line(words + (f", before {before}" if before else ""), se=True))
    return lines


def block_lines(pair: BlockPair) -> list[Line]:
    """One block's graph as a table, and its source."""
    lines = headline(pair)
    if pair.calls > 1:
        lines.append(Line(f"called {pair.calls} times in a forward; the shapes are the first call's"))
    if pair.after is None:
        return [*lines, Line(f"no graph: {pair.failure}")]
    rows, marks = [["opcode", "name", "target", "args", "module", "output"]], [False]
    for node in pair.after.graph.nodes:
        module = node.meta.get("module")
        target = pair.after.kind(node) if node.op == "call_function" else str(node.target)
        arguments = ", ".join([*(_text(a) for a in node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
        rows.append([node.op, node.name, target, arguments, describe(module) if module else "", pair.after.shape(node)])
        marks.append(is_retrofitted(module))
    texts = aligned(rows)
    lines += [
        Line(""),
        Line(texts[0], style="bold"),
        *(Line(t, m) for t, m in zip(texts[1:], marks[1:], strict=True)),
        Line(""),
    ]
    lines += source_lines(pair)
    return lines


def _text(argument: Any) -> str:
    return str(map_arg(argument, lambda n: _Name(n.name)))


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def source_lines(pair: BlockPair) -> list[Line]:
    """The source that calls the SE modules of a block: its author's, with the calls marked."""
    lines: list[Line] = []
    for source in sources(pair):
        lines.append(Line(f"{source.name}:", style="bold"))
        unchanged = set(source.before)
        shown = textwrap.dedent("".join(source.after)).splitlines()
        lines += [Line(text, line not in unchanged) for line, text in zip(source.after, shown, strict=True)]
    return lines
