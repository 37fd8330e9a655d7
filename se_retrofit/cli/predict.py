"""``se-retrofit predict DIR IMAGES...``: classify images with a fine-tuned network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import app


@app.command("predict")
@options.takes(options.RECIPE_FIELDS, only=("bad_images",))
def predict_command(
    context: typer.Context,
    folder: options.Folder,
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    top: Annotated[int, typer.Option(min=1, help="number of classes per image")] = 1,
    output: Annotated[Path | None, typer.Option(help="write the CSV into this file instead of printing it")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images per batch")] = 64,
    cpu: Annotated[bool, typer.Option("--cpu", help="run on the CPU even if there is a GPU")] = False,
) -> None:
    """Classify images, and print CSV: file, class, probability.

    Images are prepared as in the fine-tune's validation. With --bad-images skip, images that can't be read are reported
    after all others are classified, and the exit code is 1.
    """
    import torch

    from ..finetune.predicting import predict, write_predictions
    from ..saving import load_retrofitted
    from ..saving.atomic import replaced_file

    recipe = options.recipe_of(context, {})
    network = load_retrofitted(folder)
    if torch.accelerator.is_available() and not cpu:
        network.to(torch.accelerator.current_accelerator())
    predictions = predict(network, images, top=top, batch_size=batch_size, bad_images=recipe.bad_images)
    if output is None or str(output) == "-":
        errors = write_predictions(predictions, sys.stdout, top)
    else:
        with (
            replaced_file(output) as fresh,
            fresh.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            errors = write_predictions(predictions, file, top)
    for error in errors:
        print(error, file=sys.stderr)
    if errors:
        raise typer.Exit(1)
