"""``se-retrofit inspect``: look inside a retrofitted network, in words, code and pictures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn

from ..errors import RetrofitError
from ..inspection import drawing
from ..inspection.difference import difference_lines
from ..inspection.graphs import find_block, inspect_model
from ..inspection.lines import show
from ..inspection.page import check_target as check_page
from ..inspection.page import page
from ..inspection.printing import block_lines, tree_lines
from ..inspection.report import Report, report_of
from ..models import Base
from ..retrofit import add_se
from .app import app, say
from .folders import network_in

HELP = """
Show what a retrofit changed: where SE is, what it costs, and the blocks before and after as graph, code and picture.

MODEL is a name, whose network is built (with random weights) and retrofitted for the occasion, or a folder that a
retrofitted network was saved to.

Examples:

- `se-retrofit inspect resnet50`
- `se-retrofit inspect resnet50 --reduction 16 --graph --block layer1.0`
- `se-retrofit inspect timm/dla34 --diff`
- `se-retrofit inspect my-network/ --html my-network.html --draw my-network.svg`
- `se-retrofit inspect mobilenet_v2 --input-size 3x160x160 --json -`

Exit codes: 0, done; 1, it can't be done; 2, wrong usage.
"""


@app.command("inspect", help=HELP, no_args_is_help=True)
def inspect(
    model: str = typer.Argument(metavar="MODEL_OR_DIR", help="A name such as resnet50 or timm/resnet50, or a folder."),
    block: str | None = typer.Option(None, help="Path of one block, such as layer1.0, for --graph, --diff and --draw."),
    graph: bool = typer.Option(
        False, "--graph", help="Print the tree of modules; with --block, that block's graph and code."
    ),
    diff: bool = typer.Option(
        False, "--diff", help="Print the blocks' code before and after, as a diff; each distinct block once."
    ),
    draw: Path | None = typer.Option(None, help="Draw the blocks before and after: FILE.svg, .png, .pdf or .dot."),
    html: Path | None = typer.Option(
        None, help="Write all of it as one page, FILE.html, that opens without a network."
    ),
    json_file: Path | None = typer.Option(None, "--json", help="Write the report as JSON; - for standard output."),
    input_size: str | None = typer.Option(
        None, help="One input, without the batch, such as 3x224x224, where the usual does not fit."
    ),
    num_classes: int | None = typer.Option(
        None, min=1, help="Number of classes, where it is not the library's default."
    ),
    reduction: int | None = typer.Option(
        None, min=1, help="SE's reduction ratio (8); this and the options below go with a name."
    ),
    placement: str | None = typer.Option(
        None, help="Where SE goes (auto): auto, standard, pre, post, identity or 3x3."
    ),
    gate: str | None = typer.Option(None, help="The gate (identity): identity or sigmoid."),
    bias: bool = typer.Option(False, "--bias", help="Give SE's two linear layers biases."),
    min_hidden: int | None = typer.Option(None, min=1, help="The least width between SE's two layers (4)."),
    include: list[str] = typer.Option([], help="Only blocks whose path matches, e.g. 'layer4.*'. May be repeated."),
    exclude: list[str] = typer.Option([], help="Not the blocks whose path matches. May be repeated."),
) -> None:
    # find out before the work, not after it, that a result can't be written
    if draw is not None:
        drawing.check_target(draw)
    if html is not None:
        check_page(html)
    to_stdout = str(json_file) == "-"
    if json_file is not None and not to_stdout and not json_file.parent.is_dir():
        raise RetrofitError(f"no folder {json_file.parent} to write {json_file.name} to")
    example = None if input_size is None else _example(input_size)
    options: dict[str, Any] = {
        "reduction": reduction,
        "placement": placement,
        "gate": gate,
        "bias": bias or None,
        "min_hidden": min_hidden,
        "include": include or None,
        "exclude": exclude or None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    network = _network(model, options, num_classes, example)

    inspection = inspect_model(network, example)
    console = Console(stderr=to_stdout)
    groups = inspection.distinct() if block is None else [[find_block(inspection, block)]]
    report: Report | None = None
    if html is not None or json_file is not None or not (graph or diff or block):
        report = report_of(inspection)
    if report is not None and not (graph or diff or block or to_stdout):
        if console.is_terminal:
            console.print(report)
        else:
            say(console, report)
    if graph or (block is not None and not diff):
        show(tree_lines(inspection) if block is None else block_lines(groups[0][0]), console=console)
    if diff:
        for number, (pair, *others) in enumerate(groups):
            if number or graph:
                console.print()
            show(difference_lines(pair), console=console)
            if others:
                say(console, f"  like it: {', '.join(other.path for other in others)}")
    if draw is not None:
        with _writing(draw):
            drawing.write(inspection, groups, draw)
        say(console, f"drew {draw}")
    if html is not None:
        with _writing(html):
            html.write_text(page(inspection, report), encoding="utf-8")
        say(console, f"wrote {html}")
    if json_file is not None:
        assert report is not None
        text = json.dumps({"network": model, **report.to_dict()}, indent=2)
        if to_stdout:
            sys.stdout.write(text + "\n")
        else:
            with _writing(json_file):
                json_file.write_text(text + "\n", encoding="utf-8")
            say(console, f"wrote {json_file}")


def _network(model: str, options: dict[str, Any], num_classes: int | None, example: Any) -> nn.Module:
    """The retrofitted network that is meant: built and retrofitted, or loaded."""
    folder = Path(model)
    if folder.is_dir():
        if options or num_classes is not None:
            given = ", ".join(
                f"--{name.replace('_', '-')}" for name in [*options, *(["num_classes"] if num_classes else [])]
            )
            raise typer.BadParameter(
                f"{given} can't be given for a folder: the network in it has been retrofitted already"
            )
        from ..saving import load_retrofitted

        return load_retrofitted(network_in(folder))
    if model.startswith((".", "/", "~")) or model.endswith("/"):
        raise RetrofitError(f"no folder {model}")
    base = Base.of(model, **({} if num_classes is None else {"num_classes": num_classes}))
    return add_se(base.build(), **options, example_inputs=example, inplace=True)


def _example(size: str) -> torch.Tensor:
    """A batch of two inputs of a size such as ``3x224x224``; only its shape is read."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        raise typer.BadParameter(f"{size!r} is no size such as 3x224x224", param_hint="--input-size")
    return torch.empty(2, *map(int, size.split("x")), device="meta")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RetrofitError(f"{path} can't be written: {error.strerror or error}") from error
