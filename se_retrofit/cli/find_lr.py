"""``se-retrofit find-lr MODEL --data ...``: at which learning rate the loss falls fastest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .app import app, say
from .finetune import open_data, read_config, starting_network
from .options import (
    RECIPE_OPTIONS,
    SE_OPTIONS,
    Checkpoint,
    Data,
    Download,
    ModelArgs,
    ModelOrFolder,
    Plain,
    Pretrained,
    Root,
    refuse_for_folder,
    se_options,
    takes,
)


@app.command("find-lr")
@takes(SE_OPTIONS, RECIPE_OPTIONS, without=("epochs", "lr", "patience"))
def find_lr_command(
    context: typer.Context,
    model: ModelOrFolder,
    data: Data,
    lowest: Annotated[float, typer.Option(help="learning rate of the first step")] = 1e-6,
    highest: Annotated[float, typer.Option(help="learning rate of the last step")] = 1.0,
    steps: Annotated[int, typer.Option(help="updates")] = 100,
    plot: Annotated[
        Path | None, typer.Option(help="draw the loss over the learning rate into this file (.png, .svg)")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write all figures into this file, as JSON")] = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    arg: ModelArgs = None,
    plain: Plain = False,
    data_root: Root = Path("data"),
    download: Download = False,
) -> None:
    """Find a learning rate for finetune by training for some steps with an increasing rate.

    Network, SE and recipe are given as for finetune; the network is not saved.
    """
    from ..finetune import find_lr
    from ..finetune.engine import processes
    from ..paths import writable
    from ..saving.atomic import replaced_file

    for file in (plot, output):
        if file is not None:
            writable(file)
    if Path(model).is_dir():
        refuse_for_folder(context, "plain", "pretrained", "checkpoint", "arg")
    parts, recipe = open_data(data, data_root, download, read_config(context))
    command = {
        "model": model, "pretrained": pretrained, "checkpoint": checkpoint, "arg": arg, "plain": plain,
        **se_options(context),
    }  # fmt: skip
    network = starting_network(command, recipe)
    try:
        found = find_lr(network, parts.train, config=recipe, lowest=lowest, highest=highest, steps=steps)
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    if processes()[0] > 0:
        return  # the main process tells
    say(Console(), found)
    if plot is not None:
        say(Console(), f"wrote {found.plot(plot)}")
    if output is not None:
        with replaced_file(output) as fresh:
            fresh.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        say(Console(), f"wrote {output}")
