"""Every option that more than one command has, once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

__all__ = [
    "RECIPE_OPTIONS",
    "SE_OPTIONS",
    "example_of",
    "given",
    "recipe_fields",
    "refuse_for_folder",
    "se_options",
    "takes",
]

Options = dict[str, tuple[Any, Any]]  # the type and the default of each option, by name

MODEL_HELP = "a name: resnet50, timm/resnet50, torchvision/resnet50, hf-hub:OWNER/NAME"
FOLDER_HELP = "what add, finetune or fold wrote: a saved network, or a run's folder"
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


def known_attention(name: str) -> str:
    """A name in the table of attentions, which is imported when another than SE is asked for."""
    if name != "se":
        from ..attention import ATTENTIONS

        if name not in ATTENTIONS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, ATTENTIONS))}")
    return name


# The retrofit: the arguments of add_se, with their defaults
SE_OPTIONS: Options = {
    "reduction": (Annotated[int, typer.Option(min=1, help="reduction ratio of SE or CBAM")], 8),
    "placement": (
        Annotated[
            Literal["auto", "standard", "pre", "post", "identity", "3x3"],
            typer.Option(help="where SE goes in residual blocks"),
        ],
        "auto",
    ),
    "attention": (
        Annotated[
            str,
            typer.Option(
                callback=known_attention,
                help="se, eca, cbam, or static: a learned factor for each channel, as a control",
            ),
        ],
        "se",
    ),
    "gate": (
        Annotated[
            Literal["identity", "sigmoid"],
            typer.Option(help="of SE: identity keeps the function; sigmoid is the paper's"),
        ],
        "identity",
    ),
    "bias": (Annotated[bool, typer.Option("--bias", help="use biases in the two linear layers of SE or CBAM")], False),
    "min_hidden": (Annotated[int, typer.Option(min=1, help="minimum width between their two layers")], 4),
    "include": (
        Annotated[list[str] | None, typer.Option(help="only these blocks, such as 'layer4.*'; repeat it for more")],
        None,
    ),
    "exclude": (Annotated[list[str] | None, typer.Option(help="not these blocks; repeat it for more")], None),
    "at": (
        Annotated[
            list[str] | None,
            typer.Option(
                help="on what these modules return, such as 'decoder.*.conv2', instead of into blocks; repeat it"
            ),
        ],
        None,
    ),
    "auto": (
        Annotated[
            bool | None, typer.Option("--auto", help="with --at: into the blocks found as well", show_default=False)
        ],
        None,
    ),
}

# The recipe: a file, the fields of FinetuneConfig that are set most often, and any other field
BatchSize = Annotated[int | None, typer.Option(help="images per step and process")]
ImageSize = Annotated[int | None, typer.Option(help="height and width of the images, if not the network's own")]
Workers = Annotated[int | None, typer.Option(help="data loading processes")]
Cpu = Annotated[bool | None, typer.Option("--cpu", help="stay on the CPU")]
RECIPE_FIELDS: Options = {
    "epochs": (Annotated[int | None, typer.Option(help="passes over the data")], None),
    "batch_size": (BatchSize, None),
    "lr": (Annotated[float | None, typer.Option("--lr", help="peak learning rate")], None),
    "trainable": (Annotated[str | None, typer.Option(help="what is trained: all, se or se+head")], None),
    "image_size": (ImageSize, None),
    "precision": (Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16")], None),
    "workers": (Workers, None),
    "seed": (Annotated[int | None, typer.Option(help="random seed")], None),
    "patience": (
        Annotated[int | None, typer.Option(help="stop after this many epochs without a better accuracy")],
        None,
    ),
    "cpu": (Cpu, None),
    "compile_": (Annotated[bool | None, typer.Option("--compile", help="train through torch.compile")], None),
}
RECIPE_OPTIONS: Options = {
    "config": (Annotated[Path | None, typer.Option(help="the recipe as YAML; options override it")], None),
    **RECIPE_FIELDS,
    "set_": (
        Annotated[
            list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe, any field; repeat it for more")
        ],
        None,
    ),
}

RunFolder = Annotated[Path | None, typer.Option(help="folder for checkpoints, result and metrics")]


def takes(*groups: Options, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some groups, behind its own. It reads them from its context."""
    options = {name: option for group in groups for name, option in group.items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            command(*args, **{name: value for name, value in kwargs.items() if name not in options})

        own = inspect.signature(command, eval_str=True)
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        signature = own.replace(parameters=[*own.parameters.values(), *more])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        return run

    return decorate


def se_options(context: typer.Context) -> dict[str, Any]:
    """The arguments of ``add_se`` that a command got."""
    values = {name: context.params[name] for name in SE_OPTIONS if name in context.params}
    return {**values, **{name: list(values[name]) if values[name] else None for name in ("include", "exclude", "at")}}


def recipe_fields(context: typer.Context) -> dict[str, Any]:
    """The fields of ``FinetuneConfig`` that are given as options of their own."""
    values = {name.rstrip("_"): context.params.get(name) for name in RECIPE_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


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
