"""``se-retrofit evaluate DIR --data ...``: how good a fine-tuned network is, class by class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .app import app, say
from .folders import network_in, run_settings, training_data_of
from .options import BatchSize, Cpu, Data, Download, Folder, ImageSize, Root, Workers


@app.command("evaluate")
def evaluate_command(
    folder: Folder,
    data: Data,
    data_root: Root = Path("data"),
    download: Download = False,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        typer.Option(
            help="which images; by default all of a folder of classes, elsewhere val, or test where there is no val",
            show_default=False,
        ),
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="draw the confusion matrix into this file (.png, .svg)")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write all figures into this file, as JSON")] = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    cpu: Cpu = None,
) -> None:
    """Evaluate a saved network: accuracy, and for each class precision, recall and F1.

    Images are prepared as in the fine-tune's validation; of a run's folder, its recipe tells the image size. Of a folder of
    classes that a run has split by itself, val is what it held out, and train what it was trained on.
    """
    from ..finetune import FinetuneConfig, evaluate, load_split
    from ..finetune.splits import trained_on
    from ..finetune.transforms import class_names
    from ..saving import load_retrofitted
    from ..saving.atomic import replaced_file

    saved = network_in(folder)
    network = load_retrofitted(saved)
    named = {"image_size": image_size, "batch_size": batch_size, "workers": workers, "cpu": cpu}
    chosen = {name: value for name, value in named.items() if value is not None}
    config = FinetuneConfig(**{**run_settings(saved), **chosen})
    part = load_split(
        data, split, root=data_root, download=download, image_size=config.image_size, classes=class_names(network)
    )
    remark = trained_on(part, training_data_of(saved))
    if remark:
        say(Console(), remark)
    found = evaluate(network, part, config=config)
    say(Console(), found)
    if confusion is not None:
        say(Console(), f"wrote {found.plot(confusion)}")
    if output is not None:
        with replaced_file(output) as fresh:
            fresh.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        say(Console(), f"wrote {output}")
