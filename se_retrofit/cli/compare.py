"""``se-retrofit compare MODEL --data ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .finetune import absolute, default_name, network_builder, open_data, read_config
from .options import (
    RECIPE_OPTIONS,
    SE_OPTIONS,
    Checkpoint,
    Data,
    Download,
    ModelArgs,
    ModelOrFolder,
    Pretrained,
    Root,
    RunFolder,
    se_options,
    takes,
)
from .signals import Signals


@app.command("compare")
@takes(SE_OPTIONS, RECIPE_OPTIONS, without=("attention", "trainable", "patience"))
def compare_command(
    context: typer.Context,
    model: ModelOrFolder,
    data: Data,
    seeds: Annotated[int, typer.Option(help="runs of each network")] = 3,
    arms: Annotated[
        str,
        typer.Option(
            help="plain and others, with commas: se, eca, cbam, static (a factor for each channel), sigmoid (SE with the paper's gate)"
        ),
    ] = "plain,se,static",
    output: RunFolder = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    arg: ModelArgs = None,
    data_root: Root = Path("data"),
    download: Download = False,
) -> None:
    """Does SE help? Fine-tune a network with and without SE, with the same recipe, and compare them seed by seed.

    Rerun the command to resume.
    """
    from ..finetune import compare
    from ..finetune.experiment import describe_data, file_digest

    recipe = read_config(context)
    parts, recipe = open_data(data, data_root, download, recipe)
    build = network_builder(model, pretrained, checkpoint, arg)
    options = se_options(context)
    if output is None:
        details = [
            absolute(model), arg, pretrained, None if checkpoint is None else file_digest(checkpoint),
            options, recipe.to_dict(), describe_data(parts.train), describe_data(parts.val),
        ]  # fmt: skip
        output = Path("runs") / f"compare-{default_name(model, data, details)}"
    with Signals() as signals:
        comparison = compare(
            build,
            parts.train,
            parts.val,
            config=recipe,
            seeds=seeds,
            se_options=options,
            arms=[name.strip() for name in arms.split(",")],
            output_dir=output,
            stop=signals.stop,
        )
    print(f"\n{comparison}\n\nwritten to {output / 'comparison.json'}")
