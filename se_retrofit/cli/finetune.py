"""``se-retrofit finetune MODEL --data ...``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RetrofitError
from .app import app
from .folders import network_in
from .options import (
    DATA_HELP,
    FOLDER_HELP,
    MODEL_HELP,
    RECIPE_OPTIONS,
    SE_OPTIONS,
    Checkpoint,
    Download,
    ModelArgs,
    Plain,
    Pretrained,
    Root,
    RunFolder,
    given,
    recipe_fields,
    refuse_for_folder,
    se_options,
    takes,
)
from .signals import Signals

if TYPE_CHECKING:
    from torch import nn

    from ..finetune import FinetuneConfig, NamedData

# What run.yaml holds of a command, besides the recipe
COMMAND_TYPES: dict[str, Any] = {
    "model": str, "data": str, "data_root": str, "pretrained": bool, "checkpoint": (str, NoneType), "arg": list, "plain": bool,
}  # fmt: skip
COMMAND = {*COMMAND_TYPES, *SE_OPTIONS}


@app.command("finetune")
@takes(SE_OPTIONS, RECIPE_OPTIONS)
def finetune_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL|DIR", help=f"{MODEL_HELP}; or {FOLDER_HELP}")] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    output: RunFolder = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="resume the run in this folder; network, SE, data and recipe are read from its run.yaml; a larger --epochs extends a finished run"
        ),
    ] = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    arg: ModelArgs = None,
    plain: Plain = False,
    data_root: Root = Path("data"),
    download: Download = False,
) -> None:
    """Retrofit a network and fine-tune it. Give MODEL and --data, or only --resume FOLDER. A network that add, finetune or
    fold wrote is trained without a further retrofit.

    Under torchrun or accelerate launch the same command runs on several GPUs or machines. Load the result, in
    OUTPUT/best, with load_retrofitted.
    """
    from ..finetune import finetune
    from ..finetune.experiment import describe_run

    command = {
        "model": absolute(model), "data": absolute(data), "data_root": str(data_root.resolve()), "pretrained": pretrained,
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()), "arg": arg or [], "plain": plain,
        **se_options(context),
    }  # fmt: skip
    if model is not None and Path(model).is_dir():
        refuse_for_folder(context, "plain", "pretrained", "checkpoint", "arg")
    recipe = read_config(context)
    if resume is not None:
        command, recipe = read_run(resume, set(given(context)))
        if (epochs := context.params["epochs"]) is not None:  # to extend a run that is over
            recipe = recipe.replace(epochs=epochs)
    if command["model"] is None or command["data"] is None:
        raise RetrofitError("give a MODEL and --data, or --resume FOLDER to resume a run")
    parts, recipe = open_data(command["data"], Path(command["data_root"]), download, recipe)
    network = starting_network(command, recipe)
    if resume is None and output is None:
        details = [recipe.to_dict(), describe_run(network, parts.train, parts.val)]
        output = Path("runs") / default_name(command["model"], command["data"], details)
    with Signals() as signals:
        finetune(
            network,
            parts.train,
            parts.val,
            config=recipe,
            output_dir=resume or output,
            resume=resume is not None,
            command=command,
            stop=signals.stop,
        )


# What finetune, find-lr and compare share


def starting_network(command: dict[str, Any], recipe: FinetuneConfig) -> nn.Module:
    """The network that a command trains."""
    import torch

    from ..retrofit import add_se

    weights = None if command["checkpoint"] is None else Path(command["checkpoint"])
    build = network_builder(command["model"], command["pretrained"], weights, command["arg"])
    # A seeded start, so that a run that is resumed, and each of many processes, has the same
    torch.manual_seed(recipe.seed)
    network = build()
    if not command["plain"] and not Path(command["model"]).is_dir():
        network = add_se(network, **{name: command[name] for name in SE_OPTIONS}, inplace=True)
    return network


def absolute(name: str | None) -> str | None:
    """A folder by its absolute path, any other name as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def read_config(context: typer.Context) -> FinetuneConfig:
    """The recipe: from the file, then ``--set``, then the options that have names of their own."""
    from ..finetune import FinetuneConfig

    file = context.params["config"]
    fields = FinetuneConfig.from_yaml(file).to_dict() if file is not None else {}
    fields.update(read_settings(context.params["set_"], "--set"))
    fields.update(recipe_fields(context))
    return FinetuneConfig(**fields)


def read_settings(settings: list[str] | None, option: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values are read as YAML."""
    from ..plaindata import parse_yaml

    read = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise RetrofitError(f"{option} takes NAME=VALUE, got {setting!r}")
        read[name.strip().replace("-", "_")] = parse_yaml(value, f"the value of {option} {setting!r}")
    return read


def open_data(data: str, root: Path, download: bool, recipe: FinetuneConfig) -> tuple[NamedData, FinetuneConfig]:
    """The data, and the recipe with its number of classes."""
    from ..finetune import load_data

    parts = load_data(data, root=root, download=download, image_size=recipe.image_size)
    if parts.note:
        typer.echo(parts.note)
    if recipe.num_classes is None:
        if parts.num_classes is None:
            raise RetrofitError(f"the number of classes of {data} is not known: give it with --set num_classes=...")
        recipe = recipe.replace(num_classes=parts.num_classes)
    return parts, recipe


def network_builder(
    name: str, pretrained: bool, checkpoint: Path | None, arg: list[str] | None
) -> Callable[[], nn.Module]:
    """A function that builds the bare network."""
    from ..models import Base, load_checkpoint
    from ..saving import load_retrofitted

    if Path(name).is_dir():
        saved = network_in(Path(name))
        return lambda: load_retrofitted(saved)
    if pretrained and checkpoint is not None:
        raise RetrofitError("give --pretrained or --checkpoint, not both")
    base = Base.of(name, **read_settings(arg, "--arg"))

    def build() -> nn.Module:
        network = base.build(pretrained)
        if checkpoint is not None:
            load_checkpoint(network, checkpoint)
        return network

    return build


def default_name(model: str, data: str, details: Any) -> str:
    """A folder's name for a run, which is another where ``details`` differ."""
    from ..finetune.experiment import digest, plain

    return f"{model}-{Path(data).name}".replace("/", "-").replace(":", "-") + f"-{digest(plain(details))[:8]}"


def read_run(folder: Path, given: set[str]) -> tuple[dict[str, Any], FinetuneConfig]:
    """The command and the recipe that ``run.yaml`` holds.

    Raises:
        RetrofitError: there is no run that the command line began, or options are repeated that it holds.
    """
    from ..finetune import FinetuneConfig
    from ..plaindata import parse_yaml

    repeated = sorted(given - {"resume", "download", "epochs"})
    if repeated:
        options = ", ".join(name.rstrip("_").replace("_", "-") for name in repeated)
        raise RetrofitError(f"--resume reads every option but --epochs from {folder / 'run.yaml'}; remove {options}")
    file = folder / "run.yaml"
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"), file)
        command, recipe = content["command"], FinetuneConfig(**content["config"])
    except OSError as error:
        raise RetrofitError(f"{folder} holds no run to resume: run.yaml can't be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RetrofitError(f"{file} does not hold a command and a config: {error}") from error
    if not isinstance(command, dict) or command.keys() != COMMAND:
        raise RetrofitError(
            f"the run in {folder} was not started from the command line; resume it from Python: "
            "finetune(..., output_dir=..., resume=True)"
        )
    wrong = [name for name, kinds in COMMAND_TYPES.items() if not isinstance(command[name], kinds)]
    if wrong or not all(isinstance(setting, str) for setting in command["arg"]):
        raise RetrofitError(
            f"{file}: {' and '.join(wrong or ['arg'])} of its command must be as the command line gives it"
        )
    return command, recipe
