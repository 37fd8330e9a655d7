"""All of it on one HTML page, in one file that opens without a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from ..errors import extra
from .blocks import BlockPair
from .costs import human
from .diff import diff_lines
from .drawing import sides_of
from .graphs import Recorded
from .lines import Line
from .network import network_of
from .picture import picture
from .printing import headline, source_lines, tree_lines
from .report import FIRST_NUMBER, Report, percent

with extra("inspect"):
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

__all__ = ["page"]

_CLASSES = {"green": "add", "red": "del", "cyan": "head", "bold": "head"}
_FEW = 6  # so few sites need no folding
_LONG = 22  # characters, above which a cell in the table of sites is wrapped


def page(found: Recorded, report: Report) -> str:
    """The page about an inspected model."""
    from .. import __version__

    groups = found.distinct()
    links = {pair.path: f"#block-{i}" for i, group in enumerate(groups, 1) for pair in group}
    drawn = picture(network_of(found), links)  # smaller than this, its words are not legible, and the page scrolls
    environment = Environment(
        loader=PackageLoader("se_retrofit.inspection", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        report=report,
        cards=_cards(report),
        network=drawn.svg("the network", style=f"min-width: {0.75 * drawn.width:.0f}px"),
        version=__version__,
        blocks=[_block(group) for group in groups],
        tree=_lines(tree_lines(found)),
        **_stages(report, links),
    )


def _stages(report: Report, links: dict[str, str]) -> dict[str, Any]:
    """The table of sites, with a sum for each stage: neighbours whose feature maps are of one size."""
    header, cells = report.cells()
    pairs = zip(report.rows, cells, strict=True)
    stages: list[dict[str, Any]] = []
    for space, group in itertools.groupby(pairs, key=lambda pair: pair[0].space):
        rows, texts = zip(*group, strict=True)
        adds = [row.multiply_adds for row in rows if row.multiply_adds is not None]
        names = [", ".join(dict.fromkeys(text[i] for text in texts)) for i in range(len(header))]
        size = "x".join(map(str, space)) or "not called"
        stage = [f"{size}, {len(rows)} site{'s' * (len(rows) > 1)}", *names[1:3], "", "", "", names[6]]
        stage += [f"{sum(row.parameters for row in rows):,}", f"{sum(adds):,}" if adds else ""]
        listed = [{"cells": text, "link": links.get(row.block)} for row, text in zip(rows, texts, strict=True)]
        stages.append({"cells": stage, "rows": listed, "open": len(report.rows) <= _FEW})
    everything = [header, *cells, *(stage["cells"] for stage in stages)]
    return {
        "header": header,
        "numbers": FIRST_NUMBER,
        "stages": stages,
        "widths": _widths(everything, _LONG),
        "long": [i for i, column in enumerate(zip(*everything, strict=True)) if i and max(map(len, column)) > _LONG],
    }


def _widths(rows: Iterable[list[str]], most: int | None = None) -> str:
    """Columns wide enough for all rows, open or not: as many digits as there are characters, and room for a mark; those
    after the first one no wider than ``most``."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return " ".join(f"{width}ch" for width in (first + 2, *(min(width, most or width) for width in others)))


def _cards(report: Report) -> list[dict[str, str]]:
    added = report.parameters_after - report.parameters_before
    cards = [
        {
            "what": "parameters",
            "much": f"{report.parameters_after:,}",
            "more": f"+{added:,} (+{percent(added, report.parameters_before)})",
        },
        {
            "what": "trainable",
            "much": f"{report.trainable_after:,}",
            "more": f"{percent(report.trainable_after, report.parameters_after)} of all",
        },
    ]
    if report.multiply_adds_before is not None and report.multiply_adds_after is not None:
        whole = report.multiply_adds_after + report.squeeze_scale
        more = whole - report.multiply_adds_before
        cards.append(
            {
                "what": f"multiply-adds, one {report.inputs} input"
                + (f", resized to {report.resized}" if report.resized else ""),
                "much": human(whole),
                "more": f"+{human(more)} (+{percent(more, report.multiply_adds_before)})",
            }
        )
    return cards


def _block(group: list[BlockPair]) -> dict[str, Any]:
    pair = group[0]
    title, *places = (line.text for line in headline(pair))
    block: dict[str, Any] = {
        "title": title,
        "place": "; ".join(places),
        "others": [other.path for other in group[1:]],
        "failure": pair.failure,
        "sides": [],
        "diff": [],
        "code": [],
    }
    if pair.failure is None:
        block["sides"] = [side.svg(word) for word, side in zip(("before", "after"), sides_of(pair), strict=True)]
        block["diff"] = _lines(diff_lines(pair))
        block["code"] = _lines(source_lines(pair))
    return block


def _lines(lines: Iterable[Line]) -> list[dict[str, str]]:
    return [{"text": line.text, "cls": "se" if line.se else _CLASSES.get(line.style, "")} for line in lines]
