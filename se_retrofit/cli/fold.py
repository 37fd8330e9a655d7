"""``se-retrofit fold DIR --data ...``: fold SE that has become constant into the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..paths import writable
from .app import app, say
from .folders import network_in
from .options import Data, Download, Folder, ImageSize, Root


@app.command("fold")
def fold_command(
    folder: Folder,
    data: Data,
    output: Annotated[Path | None, typer.Option(help="folder for the folded network; DIR-folded by default")] = None,
    tolerance: Annotated[float, typer.Option(help="largest change of the outputs, relative to their norm")] = 0.01,
    max_accuracy_loss: Annotated[float, typer.Option(help="by how much the accuracy may drop, from 0 to 1")] = 0.005,
    batches: Annotated[int, typer.Option(help="number of batches of 32 validation images")] = 8,
    image_size: ImageSize = None,
    data_root: Root = Path("data"),
    download: Download = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the report as JSON")] = None,
) -> None:
    """Fold SE whose gates hardly depend on the image into the weights around it, and save the result.

    Which sites are folded is decided on the validation images. Load the result with load_retrofitted.
    """
    from ..finetune import FinetuneConfig, load_data
    from ..finetune.data import stream
    from ..finetune.transforms import transforms_for
    from ..folding import fold_se
    from ..saving import load_retrofitted
    from ..saving.atomic import replaced_directory
    from ..saving.networks import write_network
    from ..saving.recipe import RECIPE, WEIGHTS

    network = load_retrofitted(network_in(folder))
    if json_file is not None:
        writable(json_file)
    parts = load_data(data, root=data_root, download=download, image_size=image_size)
    transform = transforms_for(network, FinetuneConfig(image_size=image_size), train=False)
    images = stream(parts.val, name="val", train=False, batch_size=32, transform=transform)
    folded = fold_se(
        network, images.batches(0), tolerance=tolerance, max_accuracy_loss=max_accuracy_loss, max_batches=batches,
        inplace=True,
    )  # fmt: skip
    report: Any = folded.fold_report
    target = output or folder.with_name(f"{folder.name}-folded")
    with replaced_directory(target, (WEIGHTS, RECIPE)) as fresh:
        write_network(folded, fresh)
    console = Console()
    say(console, report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        say(console, f"wrote {json_file}")
    say(console, f"saved to {target}")
