"""``se-retrofit inspect``: look inside a retrofitted network, in words, code and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..errors import RetrofitError
from ..paths import writable
from . import options
from .app import app, leave_to_json, say, write_json
from .starting import run_settings

if TYPE_CHECKING:
    from torch import nn

HELP = """
Show what a retrofit changed: where SE is, what it costs, and the blocks before and after as graphs, code and pictures.

MODEL is a name, for which a network is built (with random weights) and retrofitted, or a folder written by
`add`, `finetune` or `fold`.

Examples:

- `se-retrofit inspect resnet50`
- `se-retrofit inspect resnet50 --reduction 16 --graph --block layer1.0`
- `se-retrofit inspect timm/dla34 --diff`
- `se-retrofit inspect my-network/ --html my-network.html --draw my-network.svg`
- `se-retrofit inspect mobilenet_v2 --input-size 3x160x160 --json -`
- `se-retrofit inspect my-network/ --json - | jq -e '.parameters_after < 1.2 * .parameters_before'`

Exit codes: 0 on success; 1 on an error; 2 for wrong usage.
"""


@app.command("inspect", help=HELP, no_args_is_help=True)
@options.takes(options.SE_OPTIONS)
def inspect(
    context: typer.Context,
    model: options.ModelOrFolder,
    block: Annotated[
        str | None, typer.Option(help="path of a block, or of a module in it, for --graph, --diff and --draw")
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="print the tree of modules; with --block, that block's graph and code")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="print the blocks' code before and after, once for each distinct block")
    ] = False,
    draw: Annotated[Path | None, typer.Option(help="draw the network, and blocks before and after: FILE.svg")] = None,
    html: Annotated[Path | None, typer.Option(help="write everything as one page, FILE.html")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the report as JSON; - prints it")] = None,
    input_size: options.InputSize = None,
    num_classes: options.NumClasses = None,
) -> None:
    leave_to_json(context, json_file)
    # fail before the work, not after it
    for file, endings in ((draw, (".svg",)), (html, (".html", ".htm")), (json_file, ())):
        if file is not None and str(file) != "-":
            writable(file, *endings)
    from ..inspection import inspect_se

    network = network_of(context, model)
    size = size_of_run(network, Path(model)) if input_size is None else input_size
    inspection = inspect_se(network, None if size is None else options.example_of(size))
    if block is not None:
        inspection.block(block)  # raises for an unknown block before anything is printed or written
    console = Console()
    in_words = not (graph or diff or block)
    if in_words and str(json_file) != "-":
        if console.is_terminal:
            console.print(inspection)
        else:
            say(console, inspection)
    if graph or (block is not None and not diff):
        show(console, inspection.graph(block))
    if diff:
        if graph:
            console.print()
        show(console, inspection.diff(block))
    if draw is not None:
        say(console, f"drew {inspection.draw(draw, block)}")
    if html is not None:
        say(console, f"wrote {inspection.write_html(html)}")
    if json_file is not None:
        write_json(context, {"network": model, **inspection.to_dict()}, json_file)


# the styles of lines about SE in a graph, and of a diff, by their first letters
STYLES = {"> ": "bold dark_orange", "---": "bold", "+++": "bold", "@": "cyan", "+": "green", "-": "red"}


def show(console: Console, text: str) -> None:
    """Print a graph or a diff, in colour if the console is a terminal."""
    for line in text.splitlines():
        style = next((style for start, style in STYLES.items() if line.startswith(start)), "")
        console.print(Text(line, style=style), soft_wrap=True)


def network_of(context: typer.Context, model: str) -> nn.Module:
    """Load the retrofitted network from a folder, or build and retrofit it by name."""
    if Path(model).is_dir():
        options.refuse_for_folder(context, "num_classes")
        from ..saving import load_retrofitted

        return load_retrofitted(model)
    if model.startswith((".", "/", "~")) or model.endswith("/"):
        raise RetrofitError(f"no folder {model}")
    from ..models import Base
    from ..retrofit import add_se

    num_classes, size = context.params["num_classes"], context.params["input_size"]
    base = Base.of(model, **({} if num_classes is None else {"num_classes": num_classes}))
    example = None if size is None else options.example_of(size)
    return add_se(base.build(), **options.se_options(context), example_inputs=example, inplace=True)


def size_of_run(network: nn.Module, folder: Path) -> str | None:
    """Return the image size that the run in a folder was given; None if it was given none."""
    from ..saving.recipe import network_in

    side = run_settings(network_in(folder)).get("image_size") if folder.is_dir() else None
    if side is None:
        return None
    from ..models import settings_of

    return "x".join(map(str, settings_of(network, side)["input_size"]))
