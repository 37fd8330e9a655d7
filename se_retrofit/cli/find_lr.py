"""``se-retrofit find-lr MODEL --data ...``: find the learning rate at which the loss falls fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..paths import drawable, writable
from . import options
from .app import app, leave_to_json, say, write_json
from .starting import Start, open_data, read_config


@app.command("find-lr")
@options.takes(
    options.START_OPTIONS,
    options.DATA_OPTIONS,
    options.SE_OPTIONS,
    options.RECIPE_OPTIONS,
    without=("epochs", "max_updates", "lr", "patience"),
)
def find_lr_command(
    context: typer.Context,
    model: options.ModelOrFolder,
    data: options.Data,
    lowest: Annotated[float, typer.Option(help="learning rate of the first step")] = 1e-6,
    highest: Annotated[float, typer.Option(help="learning rate of the last step")] = 1.0,
    steps: Annotated[int, typer.Option(help="updates")] = 100,
    plot: Annotated[
        Path | None, typer.Option(help="draw the loss over the learning rate into this file (.png, .svg)")
    ] = None,
    output: options.Figures = None,
) -> None:
    """Find a learning rate for finetune by training for a number of steps at an increasing rate.

    Network, SE and recipe are specified as for finetune; the network is not saved.
    """
    leave_to_json(context, output)
    for file, check in ((plot, drawable), (output, writable)):
        if file is not None:
            check(file)
    start, recipe = Start.of(context), read_config(context)
    from ..finetune import find_lr
    from ..finetune.engine import processes

    parts, recipe = open_data(context, data, recipe)
    network = start.network(recipe)
    found = find_lr(network, parts.train, config=recipe, lowest=lowest, highest=highest, steps=steps)
    if processes()[0] > 0:
        return  # the main process prints
    say(Console(), found)
    if plot is not None:
        say(Console(), f"wrote {found.plot(plot)}")
    if output is not None:
        write_json(context, found.to_dict(), output)
