"""The whole inspection as one HTML file that works offline."""

from __future__ import annotations

from typing import Any

from ..errors import extra
from ..plan import folded
from .blocks import BlockPair, Inspected
from .costs import human
from .diff import diff_lines
from .drawing import sides_of
from .network import network_of
from .picture import picture
from .printing import headline
from .report import NUMBERS, OPTIONAL, Report, percent

with extra("inspect"):
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

# the CSS classes of columns of the table of sites
COLUMNS = {"number": NUMBERS, "optional": OPTIONAL[:-1], "after": ("SE after",)}
# the CSS classes of lines of a diff, by their first letters
_CLASSES = {"---": "head", "+++": "head", "@": "head", "+": "add", "-": "del"}


def page(found: Inspected, report: Report) -> str:
    from .. import __version__

    groups = found.distinct()
    links = {pair.path: f"#block-{i}" for i, group in enumerate(groups, 1) for pair in group}
    drawn = picture(network_of(found), links)
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
        network=drawn.svg("the network", style=f"--legible: {0.57 * drawn.width:.0f}px"),
        version=__version__,
        blocks=[_block(group) for group in groups],
        columns={
            name: " ".join(cls for cls, names in COLUMNS.items() if name in names) for name in report.rows[0].cells()
        },
        links=links,
        skipped=folded(report.skipped),
    )


def _cards(report: Report) -> list[dict[str, Any]]:
    """Return the totals; differences are marked as such."""
    added = report.parameters_after - report.parameters_before
    share = percent(report.trainable_after, report.parameters_after)
    more = f"+{added:,} (+{percent(added, report.parameters_before)})"
    cards: list[tuple[str, str, str, bool]] = [
        ("parameters", f"{report.parameters_after:,}", more, True),
        ("trainable", f"{report.trainable_after:,}", f"{share} of all", False),
    ]
    if report.multiply_adds_before is not None and report.multiply_adds_after is not None:
        whole = report.multiply_adds_after + report.squeeze_scale
        gained = whole - report.multiply_adds_before
        size = f"one {report.inputs} input" + (f", resized to {report.resized}" if report.resized else "")
        change = f"+{human(gained)} (+{percent(gained, report.multiply_adds_before)})"
        cards.append((f"multiply-adds, {size}", human(whole), change, True))
    return [dict(zip(("what", "much", "more", "is_change"), card, strict=True)) for card in cards]


def _block(group: list[BlockPair]) -> dict[str, Any]:
    pair = group[0]
    title, places = headline(pair)
    return {
        "title": title,
        "place": "; ".join(places),
        "others": [other.path for other in group[1:]],
        "sides": [side.svg(word) for word, side in zip(("before", "after"), sides_of(pair), strict=True)],
        "diff": [
            {"text": line, "cls": next((cls for start, cls in _CLASSES.items() if line.startswith(start)), "")}
            for line in diff_lines(pair)
        ],
    }
