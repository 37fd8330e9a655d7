"""``se-retrofit evaluate DIR --data ...``: measure a fine-tuned network, class by class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ..paths import drawable
from . import options
from .app import app, leave_to_json, say, write_json
from .starting import run_settings, training_data_of

SPLIT_HELP = "which images to measure; by default all of a folder of classes, otherwise val, or test if there is no val"


@app.command("evaluate")
@options.takes(
    options.DATA_OPTIONS,
    options.RECIPE_FIELDS,
    only=("data_root", "download", "limit", "image_size", "batch_size", "workers", "cpu", "bad_images"),
)
def evaluate_command(
    context: typer.Context,
    folder: options.Folder,
    data: options.Data,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None, typer.Option(help=SPLIT_HELP, show_default=False)
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="draw the confusion matrix into this file (.png, .svg)")
    ] = None,
    output: options.Figures = None,
) -> None:
    """Evaluate a saved network: accuracy, and the precision, recall and F1 of each class.

    Images are prepared as in the fine-tune's validation; the folder of a run also gives the image size. If the run
    split a folder of classes itself, val is the part that it held out, and train the part that it trained on.
    """
    from ..finetune import evaluate, load_split
    from ..finetune.datasets import limited, trained_on
    from ..finetune.engine import processes
    from ..finetune.transforms import class_names
    from ..saving import load_retrofitted
    from ..saving.recipe import network_in

    leave_to_json(context, output)
    if confusion is not None:
        drawable(confusion)
    saved, console = network_in(folder), Console()
    network = load_retrofitted(saved)
    config = options.recipe_of(context, run_settings(saved))
    part = load_split(
        data,
        split,
        root=context.params["data_root"],
        download=context.params["download"],
        image_size=config.image_size,
        classes=class_names(network),
    )
    main = processes()[0] == 0  # of several processes one prints and writes
    if main and (remark := trained_on(part, training_data_of(saved))):
        say(console, remark)
    if (limit := context.params["limit"]) is not None:
        few = limited(part.data, limit)
        part = replace(part, data=few, about=f"{part.about}; {len(few):,} of them, at most {limit:,} of each class")
    found = evaluate(network, part.data, config=config)
    if not main:
        return
    say(console, f"{part.about}\n{found}")
    if confusion is not None:
        say(console, f"wrote {found.plot(confusion)}")
    if output is not None:
        write_json(context, {**found.to_dict(), "split": part.name, "about": part.about}, output)
