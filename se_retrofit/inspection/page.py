"""All of it on one HTML page, in one file that opens without a network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import RetrofitError, extra
from ..paths import writable
from .costs import human
from .difference import difference_of
from .drawing import INSTALL, drawing_of, has_graphviz, svg_of
from .graphs import BlockPair, Inspection, inspect_model
from .lines import Line
from .modules import FIRST_NUMBER as FIRST_MODULE_NUMBER
from .modules import HEADER, ModuleRow, cells_of
from .printing import headline, source_lines, tree_lines
from .report import FIRST_NUMBER, Report, percent, report_of

with extra("inspect"):
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

__all__ = ["page", "write_page"]


def write_page(model: nn.Module, path: str | Path, *, example_inputs: Any = None) -> Path:
    """Write one HTML file about a retrofitted model: summary, table, drawings, differences, modules.

    The drawings are in it where Graphviz's program ``dot`` is installed. Nothing in it is fetched from anywhere.

    Args:
        model: a model that ``add_se`` has retrofitted; it is not touched.
        path: the file to write, which ends in ``.html`` or ``.htm``.
        example_inputs: a tensor or a tuple of positional inputs, for shapes and costs; without it, as in ``add_se``.

    Returns:
        The path that was written.

    Raises:
        RetrofitError: the path ends otherwise, its folder does not exist, the model has no SE that ``add_se`` put in,
            or it can't be run on the inputs. Nothing is written then.
        TypeError: it is no model, or the inputs are neither a tensor nor a tuple.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.inspection import write_page
        >>> write_page(add_se(timm.create_model("resnet18")), f"{tempfile.mkdtemp()}/resnet18.html").name
        'resnet18.html'
    """
    path = check_target(path)
    path.write_text(page(inspect_model(model, example_inputs)), encoding="utf-8")
    return path


def check_target(path: str | Path) -> Path:
    """The path of a page, once it is clear that it can be written there."""
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise RetrofitError(f"{path} does not end in .html, which the page is")
    return writable(path)


def page(inspection: Inspection, report: Report | None = None) -> str:
    """The page about an inspected model."""
    from .. import __version__

    report = report or report_of(inspection)
    header, cells = report.cells()
    environment = Environment(
        loader=PackageLoader("se_retrofit.inspection", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    previous = [None, *(row.shape[-2:] for row in report.rows)]
    rows = [
        {"cells": row, "stage": before is not None and before != data.shape[-2:]}
        for row, data, before in zip(cells, report.rows, previous, strict=False)
    ]
    return environment.get_template("page.html").render(
        report=report,
        cards=_cards(report),
        header=header,
        rows=rows,
        numbers=FIRST_NUMBER,
        install=INSTALL,
        version=__version__,
        blocks=[_block(inspection, group) for group in inspection.distinct()],
        tree=_lines(tree_lines(inspection)),
        **_modules(report.modules),
    )


def _modules(rows: tuple[ModuleRow, ...]) -> dict[str, Any]:
    """The table of modules as a tree, which is open down to the stages, and how wide its columns are."""
    cells = [cells_of(row) for row in rows]
    kept = [i for i in range(len(HEADER)) if any(row[i] for row in cells)]
    widths = [max(len(row[i]) for row in (HEADER, *cells)) for i in kept]
    nodes: dict[str, dict[str, Any]] = {
        row.path: {"cells": [texts[i] for i in kept], "se": row.se, "open": row.depth < 1, "parts": []}
        for row, texts in zip(rows, cells, strict=True)
    }
    for row in rows[1:]:
        nodes[row.path.rpartition(".")[0]]["parts"].append(nodes[row.path])
    return {
        "modules": nodes[""],
        "module_header": [HEADER[i] for i in kept],
        "module_numbers": FIRST_MODULE_NUMBER,
        "module_widths": " ".join(f"{width + 2}ch" for width in widths),
    }


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
                "what": f"multiply-adds, one {report.inputs} input",
                "much": human(whole),
                "more": f"+{human(more)} (+{percent(more, report.multiply_adds_before)})",
            }
        )
    return cards


def _block(inspection: Inspection, group: list[BlockPair]) -> dict[str, Any]:
    pair = group[0]
    title, *places = (line.text for line in headline(pair))
    block: dict[str, Any] = {
        "title": title,
        "place": "; ".join(places),
        "others": ", ".join(other.path for other in group[1:]),
        "failure": pair.failure,
        "svg": "",
        "diff": [],
        "code": [],
    }
    if pair.failure is None:
        if has_graphviz():
            # ids are unique within a drawing, not within the page
            block["svg"] = re.sub(r' id="[^"]*"', "", svg_of(drawing_of(inspection, [group], title=False)))
        marks = {"+": "add", "-": "del", "@": "head"}
        block["diff"] = [
            {"text": line, "cls": "head" if line[:3] in ("+++", "---") else marks.get(line[:1], "")}
            for line in difference_of(pair)
        ]
        block["code"] = _lines(source_lines(pair))
    return block


def _lines(lines: Iterable[Line]) -> list[dict[str, str]]:
    return [{"text": line.text, "cls": "se" if line.se else ""} for line in lines]
