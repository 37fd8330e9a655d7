"""``se-retrofit export DIR --format ...``: export a saved network for other programs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .app import app, say
from .options import Folder, InputSize, example_of
from .starting import beside

DYNAMIC_HELP = "sizes that onnx and pt2 accept: any batch size; any height and width, too (slow to export); or one size"


@app.command("export")
def export_command(
    folder: Folder,
    format: Annotated[
        Literal["onnx", "pt2", "source"] | None,
        typer.Option(help="format of the file; by default that of OUTPUT's suffix, or onnx"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="file to write; by default beside DIR, with its name")] = None,
    dynamic: Annotated[Literal["batch", "all", "none"], typer.Option(help=DYNAMIC_HELP)] = "batch",
    input_size: InputSize = None,
    native: Annotated[
        bool, typer.Option("--native", help="first convert the gates to plain sigmoids, which is exact")
    ] = False,
) -> None:
    """Export a saved network, and check that the exported file gives the same outputs.

    The format source is a Python file with the changed classes and SE in plain PyTorch, and the weights beside it.
    """
    import torch

    from ..exporting import export
    from ..exporting.export import SUFFIXES
    from ..folding import to_native
    from ..saving import load_retrofitted

    example, console = None, Console()
    if input_size is not None:
        like = example_of(input_size)
        example = torch.rand(like.shape, generator=torch.Generator().manual_seed(0))
    network = load_retrofitted(folder)
    if native:
        network = to_native(network)
    file = output or beside(folder, SUFFIXES[format or "onnx"])
    doing = f"writing {file} and comparing its outputs"
    shown = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as progress,
        warnings.catch_warnings(record=True) as notes,
    ):
        warnings.simplefilter("always")
        if not console.is_terminal:
            say(console, doing)
        progress.add_task(doing)
        export(network, file, format=format, dynamic=dynamic, example_inputs=example)
    for note in notes:
        say(console, f"note: {note.message}")
    say(console, f"wrote {file}" + (f" and {file.with_suffix('.safetensors')}" if file.suffix == ".py" else ""))
