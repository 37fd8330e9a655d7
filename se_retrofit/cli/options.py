"""Every option that more than one command has, once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

__all__ = ["example_of", "given", "recipe_options", "refuse_for_folder", "se_options"]

MODEL_HELP = "a name: resnet50, timm/resnet50, torchvision/resnet50, hf-hub:OWNER/NAME"
FOLDER_HELP = "what convert, finetune or fold wrote: a saved network, or a run's folder"
DATA_HELP = "digits, a folder with train/ and val/ or with one folder of images a class, or a name of timm's: torch/cifar10, hfds/..."

# The network and its data
ModelOrFolder = Annotated[str, typer.Argument(metavar="MODEL|DIR", help=f"{MODEL_HELP}; or {FOLDER_HELP}")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help=FOLDER_HELP)]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="start from the library's own weights")]
Checkpoint = Annotated[Path | None, typer.Option(help="start from a checkpoint of the bare network")]
ModelArgs = Annotated[
    list[str] | None, typer.Option("--arg", help="NAME=VALUE for the network's constructor; repeat it for more")
]
Plain = Annotated[bool, typer.Option("--plain", help="without SE, for comparison")]
NumClasses = Annotated[int | None, typer.Option(min=1, help="number of classes, if not the library's default")]
InputSize = Annotated[str | None, typer.Option(help="one input, without the batch, such as 3x224x224")]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Root = Annotated[Path, typer.Option(help="where timm's datasets are stored")]
Download = Annotated[bool, typer.Option("--download", help="download timm's dataset if it is missing")]

# The retrofit: the arguments of add_se
Reduction = Annotated[int, typer.Option(min=1, help="SE's reduction ratio")]
Placement = Annotated[
    Literal["auto", "standard", "pre", "post", "identity", "3x3"], typer.Option(help="where SE goes in residual blocks")
]
Gate = Annotated[
    Literal["identity", "sigmoid", "static"],
    typer.Option(
        help="identity keeps the function; sigmoid is the paper's; static is a learned factor for each channel"
    ),
]
Bias = Annotated[bool, typer.Option("--bias", help="use biases in SE's two linear layers")]
MinHidden = Annotated[int, typer.Option(min=1, help="minimum width between SE's two layers")]
Include = Annotated[list[str] | None, typer.Option(help="only these blocks, such as 'layer4.*'; repeat it for more")]
Exclude = Annotated[list[str] | None, typer.Option(help="not these blocks; repeat it for more")]
SE_OPTIONS = ("reduction", "placement", "gate", "bias", "min_hidden", "include", "exclude")

# The recipe: the fields of FinetuneConfig that are set most often
ConfigFile = Annotated[Path | None, typer.Option("--config", help="the recipe as YAML; options override it")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe, any field; repeat it for more")
]
Epochs = Annotated[int | None, typer.Option(help="passes over the data")]
BatchSize = Annotated[int | None, typer.Option(help="images per step and process")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="peak learning rate")]
Trainable = Annotated[str | None, typer.Option(help="what is trained: all, se or se+head")]
ImageSize = Annotated[int | None, typer.Option(help="height and width of the images, if not the network's own")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16")]
Workers = Annotated[int | None, typer.Option(help="data loading processes")]
Seed = Annotated[int | None, typer.Option(help="random seed")]
Cpu = Annotated[bool | None, typer.Option("--cpu", help="stay on the CPU")]
Compile = Annotated[bool | None, typer.Option("--compile", help="train through torch.compile")]
RECIPE_OPTIONS = (
    "epochs", "batch_size", "lr", "trainable", "image_size", "precision", "workers", "seed", "patience", "cpu", "compile_",
)  # fmt: skip

RunFolder = Annotated[Path | None, typer.Option(help="folder for checkpoints, result and metrics")]


def se_options(context: typer.Context) -> dict[str, Any]:
    """The arguments of ``add_se`` that a command got."""
    values = {name: context.params[name] for name in SE_OPTIONS}
    return {**values, **{name: list(values[name]) if values[name] else None for name in ("include", "exclude")}}


def recipe_options(context: typer.Context) -> dict[str, Any]:
    """The fields of ``FinetuneConfig`` for which a command has options of their own; None where they are not given."""
    return {name.rstrip("_"): context.params[name] for name in RECIPE_OPTIONS if name in context.params}


def given(context: typer.Context) -> list[str]:
    """The options and arguments that stand on the command line, by their names in the code."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def refuse_for_folder(context: typer.Context, *more: str) -> None:
    """Raise where options of the retrofit, or ``more``, are given for a network that has its SE already."""
    wrong = [f"--{name.replace('_', '-')}" for name in given(context) if name in (*SE_OPTIONS, *more)]
    if wrong:
        raise typer.BadParameter(f"{', '.join(wrong)}: the network in the folder is built and retrofitted already")


def example_of(size: str) -> torch.Tensor:
    """A batch of two inputs of a size such as ``3x224x224``; only its shape is read."""
    import torch

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        raise typer.BadParameter(f"{size!r} is not a size such as 3x224x224", param_hint="--input-size")
    return torch.empty(2, *map(int, size.split("x")), device="meta")
