"""``se-retrofit compare MODEL --data ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import app
from .signals import Signals
from .starting import Start, check_outside, default_name, open_data, read_config

ARMS_HELP = (
    "plain and others, separated by commas: se, eca, cbam, static (a factor per channel), sigmoid (SE with the paper's "
    "gate), norms (no SE, only norms and head trained), head (no SE, only the head trained)"
)


@app.command("compare")
@options.takes(
    options.START_OPTIONS,
    options.DATA_OPTIONS,
    options.SE_OPTIONS,
    options.RECIPE_OPTIONS,
    without=("plain", "attention", "patience"),
)
def compare_command(
    context: typer.Context,
    model: options.ModelOrFolder,
    data: options.Data,
    seeds: Annotated[int, typer.Option(help="number of runs of each network")] = 3,
    arms: Annotated[str, typer.Option(help=ARMS_HELP)] = "plain,se,static",
    output: options.RunFolder = None,
) -> None:
    """Does SE help? Fine-tune a network with and without SE by the same recipe, and compare the results seed by seed.

    Rerun the command to resume.
    """
    from ..finetune import compare
    from ..finetune.engine import processes
    from ..finetune.experiment import describe_data, file_digest

    start = Start.of(context)
    parts, recipe = open_data(context, data, read_config(context))
    if output is None:
        weights = None if start.checkpoint is None else file_digest(Path(start.checkpoint))
        details = [start.model_dump(), weights, recipe.to_dict(), describe_data(parts.train), describe_data(parts.val)]
        output = Path("runs") / f"compare-{default_name(model, data, details)}"
    check_outside(output, data)
    with Signals() as signals:
        comparison = compare(
            start.build,
            parts.train,
            parts.val,
            config=recipe,
            seeds=seeds,
            se_options=start.se,
            arms=[name.strip() for name in arms.split(",")],
            output_dir=output,
            stop=signals.stop,
        )
    if processes()[0] == 0:
        print(f"\n{comparison}\n\nwritten to {output / 'comparison.json'}")
