"""``se-retrofit compare MODEL --data ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .finetune import default_name, network_builder, open_data, read_config
from .options import (
    BatchSize,
    Bias,
    Checkpoint,
    Compile,
    ConfigFile,
    Cpu,
    Data,
    Download,
    Epochs,
    Exclude,
    Gate,
    ImageSize,
    Include,
    LearningRate,
    MinHidden,
    ModelArgs,
    ModelOrFolder,
    Placement,
    Precision,
    Pretrained,
    Reduction,
    Root,
    RunFolder,
    Seed,
    Set,
    Workers,
    recipe_options,
    se_options,
)


@app.command("compare")
def compare_command(
    context: typer.Context,
    model: ModelOrFolder,
    data: Data,
    seeds: Annotated[int, typer.Option(help="runs of each network")] = 3,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="plain, se, static (a factor for each channel) or sigmoid (the paper's gate); repeat it"),
    ] = None,
    output: RunFolder = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    arg: ModelArgs = None,
    reduction: Reduction = 8,
    placement: Placement = "auto",
    gate: Gate = "identity",
    bias: Bias = False,
    min_hidden: MinHidden = 4,
    include: Include = None,
    exclude: Exclude = None,
    data_root: Root = Path("data"),
    download: Download = False,
    config: ConfigFile = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    image_size: ImageSize = None,
    precision: Precision = None,
    workers: Workers = None,
    seed: Seed = None,
    cpu: Cpu = None,
    compile_: Compile = None,
    set_: Set = None,
) -> None:
    """Does SE help? Fine-tune a network with and without SE, with the same recipe, and compare them seed by seed.

    Rerun the command to resume.
    """
    from ..finetune import compare
    from ..finetune.experiment import describe_data, file_digest

    recipe = read_config(config, recipe_options(context), set_)
    parts, recipe = open_data(data, data_root, download, recipe)
    build, base = network_builder(model, pretrained, checkpoint, arg, recipe)
    options = se_options(context)
    if output is None:
        details = [
            base.library, base.name, base.kwargs, pretrained, None if checkpoint is None else file_digest(checkpoint),
            options, recipe.to_dict(), describe_data(parts.train), describe_data(parts.val),
        ]  # fmt: skip
        output = Path("runs") / f"compare-{default_name(model, data, details)}"
    try:
        comparison = compare(
            build,
            parts.train,
            parts.val,
            config=recipe,
            seeds=seeds,
            se_options=options,
            arms=arm or ("plain", "se", "static"),
            output_dir=output,
            base=base,
        )
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    print(f"\n{comparison}\n\nwritten to {output / 'comparison.json'}")
