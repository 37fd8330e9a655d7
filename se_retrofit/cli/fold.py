"""``se-retrofit fold DIR --data ...``: fold SE modules with constant gates into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..paths import writable
from . import options
from .app import app, leave_to_json, say, write_json
from .starting import beside, check_outside, open_data


@app.command("fold")
@options.takes(
    options.DATA_OPTIONS, options.RECIPE_FIELDS, only=("data_root", "download", "limit", "image_size", "bad_images")
)
def fold_command(
    context: typer.Context,
    folder: options.Folder,
    data: options.Data,
    output: Annotated[Path | None, typer.Option(help="folder for the folded network; by default DIR-folded")] = None,
    tolerance: Annotated[float, typer.Option(help="largest change of the outputs, relative to their norm")] = 0.01,
    max_accuracy_loss: Annotated[float, typer.Option(help="largest drop in accuracy, from 0 to 1")] = 0.005,
    batches: Annotated[int, typer.Option(help="number of batches of 32 validation images")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the report as JSON; - prints it")] = None,
) -> None:
    """Fold SE modules whose gates hardly depend on the image into the weights around them, and save the result.

    The validation images decide which sites are folded. Load the result with load_retrofitted.
    """
    from ..finetune.transforms import check_classes, prepared_batches
    from ..folding import fold_se
    from ..saving import load_retrofitted
    from ..saving.atomic import check_replaceable, replaced_directory
    from ..saving.networks import write_network
    from ..saving.recipe import RECIPE, WEIGHTS

    leave_to_json(context, json_file)
    target = output or beside(folder, "-folded")
    check_outside(target, data)
    check_replaceable(target, (WEIGHTS, RECIPE))
    config, network = options.recipe_of(context, {}), load_retrofitted(folder)
    if json_file is not None:
        writable(json_file)
    parts, _ = open_data(context, data, config)
    check_classes(network, parts.val)
    console = Console()
    images = prepared_batches(network, parts.val, config, lambda complaint: say(console, f"left out: {complaint}"))
    folded = fold_se(
        network, images, tolerance=tolerance, max_accuracy_loss=max_accuracy_loss, max_batches=batches, inplace=True
    )
    report: Any = folded.fold_report
    with replaced_directory(target, (WEIGHTS, RECIPE)) as fresh:
        write_network(folded, fresh)
    say(console, report)
    if json_file is not None:
        write_json(context, report.to_dict(), json_file)
    say(console, f"saved to {target}")
