"""``se-retrofit export DIR --format ...``: a saved network for other programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app, say
from .folders import FOLDER_HELP, network_in


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help=FOLDER_HELP)],
    format: Annotated[str, typer.Option(help="onnx, pt2, torchscript or source")],
    output: Annotated[Path | None, typer.Option(help="the file; beside DIR and of its name by default")] = None,
    input_size: Annotated[str | None, typer.Option(help="one input, without the batch, such as 3x224x224")] = None,
    native: Annotated[bool, typer.Option("--native", help="with plain-sigmoid gates, by exact powers of two")] = False,
) -> None:
    """Export a saved network, and see that what was written computes the same.

    The source is a Python file with the changed classes and SE in plain PyTorch, and the weights beside it.
    """
    import torch

    from ..errors import RetrofitError
    from ..exporting import export
    from ..exporting.export import SUFFIXES
    from ..folding import to_native
    from ..models import Base
    from ..saving import load_retrofitted
    from ..saving.recipe import read_recipe

    if format not in SUFFIXES:
        raise RetrofitError(f"--format must be one of {', '.join(SUFFIXES)}, got {format!r}")
    example = None
    if input_size is not None:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", input_size):
            raise typer.BadParameter(f"{input_size!r} is no size such as 3x224x224", param_hint="--input-size")
        example = torch.rand(2, *map(int, input_size.split("x")), generator=torch.Generator().manual_seed(0))
    saved = network_in(folder)
    named = read_recipe(saved)["base"]
    base = None if named is None else Base(named["library"], named["name"], named["kwargs"])
    network = load_retrofitted(saved)
    if native:
        network = to_native(network)
    file = output or folder.with_name(folder.name + SUFFIXES[format])
    export(network, file, format=format, example_inputs=example, base=base)
    say(Console(), f"wrote {file}" + (f" and {file.with_suffix('.safetensors')}" if format == "source" else ""))
