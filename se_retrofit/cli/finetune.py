"""``se-retrofit finetune MODEL --data ...``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import RetrofitError
from ..finetune.config import FinetuneConfig
from ..plaindata import read_yaml
from . import options
from .app import WrongUsage, app
from .signals import Signals
from .starting import Start, absolute, check_outside, default_name, open_data, read_config

RESUME_HELP = (
    "resume the run in this folder, with all options of its run.yaml; a larger --epochs extends a finished run, and --data "
    "says where the data is now"
)
BATCH_HELP = "draw the first training images and labels into this file, as the network will see them, and do not train"


class Command(BaseModel):
    """The part of a command that ``run.yaml`` holds besides the recipe."""

    model_config = ConfigDict(strict=True, extra="forbid")

    data: str
    data_root: str
    start: Start
    limit: int | None = None


@app.command("finetune")
@options.takes(options.START_OPTIONS, options.DATA_OPTIONS, options.SE_OPTIONS, options.RECIPE_OPTIONS)
def finetune_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL|DIR", help=f"{options.MODEL_HELP}; or {options.FOLDER_HELP}")
    ] = None,
    data: Annotated[str | None, typer.Option(help=options.DATA_HELP)] = None,
    output: options.RunFolder = None,
    show_batch: Annotated[Path | None, typer.Option(help=BATCH_HELP)] = None,
    resume: Annotated[Path | None, typer.Option(help=RESUME_HELP)] = None,
) -> None:
    """Retrofit a network and fine-tune it. Give MODEL and --data, or only --resume FOLDER. A network written by add,
    finetune or fold is trained as it is.

    Under torchrun or accelerate launch, the same command runs on several GPUs or machines. The result is in
    OUTPUT/best; load it with load_retrofitted.
    """
    if resume is not None:
        command, recipe = read_run(resume, options.given(context))
        if (epochs := context.params["epochs"]) is not None:  # to extend a finished run
            recipe = recipe.replace(epochs=epochs)
        if data is not None:  # which was moved; other data is refused
            command = command.model_copy(update={"data": absolute(data)})
    elif model is None or data is None:
        raise WrongUsage("give a MODEL and --data, or --resume FOLDER to resume a run")
    else:
        start, recipe = Start.of(context), read_config(context)
        root = context.params["data_root"].resolve()
        command = Command(data=absolute(data), data_root=str(root), start=start, limit=context.params["limit"])
    from ..finetune import finetune
    from ..finetune import show_batch as draw_batch
    from ..finetune.experiment import describe_run

    parts, recipe = open_data(context, command.data, recipe, Path(command.data_root), command.limit)
    network = command.start.network(recipe)
    if show_batch is not None:
        typer.echo(f"wrote {draw_batch(network, parts.train, show_batch, config=recipe)}")
        return
    if resume is None and output is None:
        details = [recipe.to_dict(), describe_run(network, parts.train, parts.val)]
        output = Path("runs") / default_name(command.start.model, command.data, details)
    if output is not None:
        check_outside(output, command.data)
    with Signals() as signals:
        finetune(
            network,
            parts.train,
            parts.val,
            config=recipe,
            output_dir=resume or output,
            resume=resume is not None,
            command=command.model_dump(),
            stop=signals.stop,
        )


def read_run(folder: Path, given: list[str]) -> tuple[Command, FinetuneConfig]:
    file = folder / "run.yaml"
    if repeated := sorted({*given} - {"resume", "download", "epochs", "data"}):
        names = ", ".join(name.replace("_", "-") for name in repeated)
        raise WrongUsage(f"--resume reads every option but --epochs and --data from {file}; remove {names}")
    if not file.is_file():
        raise RetrofitError(f"{folder} holds no run to resume: there is no {file.name} in it")
    content = read_yaml(file)
    try:
        if content["command"] is None:
            raise RetrofitError(
                f"the run in {folder} was not started from the command line; resume it from Python: "
                "finetune(..., output_dir=..., resume=True)"
            )
        return Command.model_validate(content["command"]), FinetuneConfig(**content["config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise RetrofitError(f"{file} does not hold a command and a config: {error}") from error
