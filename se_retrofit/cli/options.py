"""The options that several commands share; those of the recipe are the fields of ``FinetuneConfig``."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ..errors import RetrofitError
from ..finetune.config import FinetuneConfig
from ..plaindata import parse_yaml
from .app import WrongUsage

if TYPE_CHECKING:
    import torch

Options = dict[str, tuple[Any, Any]]  # the type and the default of each option, by name

MODEL_HELP = "a name: resnet50, timm/resnet50, torchvision/resnet50, hf-hub:OWNER/NAME"
FOLDER_HELP = "a folder written by add, finetune or fold (a saved network or a run)"
DATA_HELP = "digits, a folder with train/ and val/ or one folder per class, or a timm dataset: torch/cifar10, hfds/..."

# The network and its data
ModelOrFolder = Annotated[str, typer.Argument(metavar="MODEL|DIR", help=f"{MODEL_HELP}; or {FOLDER_HELP}")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help=FOLDER_HELP)]
NumClasses = Annotated[int | None, typer.Option(min=1, help="number of classes, if not the library's default")]
InputSize = Annotated[str | None, typer.Option(help="size of one input, without the batch, such as 3x224x224")]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
RunFolder = Annotated[Path | None, typer.Option(help="folder for checkpoints, result and metrics")]
Figures = Annotated[Path | None, typer.Option(help="write all figures into this file as JSON; - prints them")]


def option(kind: Any, default: Any, help: str, *names: str, **more: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, help=help, **more)], default


def known_attention(name: str) -> str:
    """Check that a name is in the table of attentions, which is imported only for names other than SE."""
    if name != "se":
        from ..attention import ATTENTIONS

        if name not in ATTENTIONS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, ATTENTIONS))}")
    return name


# The network before the retrofit
WEIGHTS_OPTIONS: Options = {
    "pretrained": option(bool, False, "start from the library's own weights", "--pretrained"),
    "checkpoint": option(Path | None, None, "start from a checkpoint of the bare network"),
    "remap": option(Literal["order"] | None, None, "match a checkpoint with other key names to the network by order"),
}
START_OPTIONS: Options = {
    **WEIGHTS_OPTIONS,
    "arg": option(list[str] | None, None, "NAME=VALUE for the network's constructor; repeatable", "--arg"),
    "plain": option(bool, False, "do not add SE, for comparison", "--plain"),
}
# In addition to --data
DATA_OPTIONS: Options = {
    "data_root": option(Path, Path("data"), "where timm's datasets are stored"),
    "limit": option(int | None, None, "at most this many images per class, always the same ones, for a dry run", min=1),
    "download": option(bool, False, "download timm's dataset if it is missing", "--download"),
}

PLACEMENTS = Literal["auto", "standard", "pre", "post", "identity", "3x3"]
ATTENTION_HELP = "se, eca, cbam, or static (a learned factor per channel, as a control)"
AT_HELP = "add SE to the outputs of these modules, such as 'decoder.*.conv2', instead of to blocks; repeatable"

# The retrofit: the arguments of add_se, with their defaults
SE_OPTIONS: Options = {
    "reduction": option(int, 8, "reduction ratio of SE or CBAM", min=1),
    "placement": option(PLACEMENTS, "auto", "where SE goes in residual blocks"),
    "attention": option(str, "se", ATTENTION_HELP, callback=known_attention),
    "gate": option(
        Literal["identity", "sigmoid"], "identity", "SE's gate: identity keeps the function; sigmoid is the paper's"
    ),
    "bias": option(bool, False, "use biases in the two linear layers of SE or CBAM", "--bias"),
    "min_hidden": option(int, 4, "minimum width between those two layers", min=1),
    "include": option(list[str] | None, None, "only these blocks, such as 'layer4.*'; repeatable"),
    "exclude": option(list[str] | None, None, "not these blocks; repeatable"),
    "at": option(list[str] | None, None, AT_HELP),
    "auto": option(bool | None, None, "with --at: add SE to the blocks found, too", "--auto", show_default=False),
}


def bare(annotation: Any) -> tuple[Any, bool]:
    """Return a field's type without its bounds, and whether it may be None."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not NoneType)
        return bare(kind)[0], True
    return get_origin(annotation) if get_origin(annotation) in (dict, tuple) else annotation, False


def from_yaml(text: str) -> Any:
    """Parse a value as in a recipe's file; ``none`` stands for null."""
    return None if text == "none" else parse_yaml(text, f"the option's value {text!r}")


def of_field(name: str) -> tuple[Any, Any]:
    """Return the option of a field. If it is not given, the field is left to the recipe's file."""
    field = FinetuneConfig.model_fields[name]
    kind, optional = bare(field.annotation)
    flag = f"--{name.replace('_', '-')}"
    shown = field.default not in (None, False, {}, ())
    more: dict[str, Any] = {"show_default": str(field.default) if shown else False}
    if kind is tuple:
        kind = list[str]
    elif kind is dict or (optional and field.default is not None):  # which may be set to none
        more |= {"parser": from_yaml, "metavar": "YAML" if kind is dict else "NUMBER|none"}
        kind = str
    names = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    return option(kind | None, None, field.description or "", names, rich_help_panel="Recipe", **more)


RECIPE_FIELDS: Options = {name: of_field(name) for name in FinetuneConfig.model_fields}
RECIPE_OPTIONS: Options = {
    "config": option(Path | None, None, "the recipe as YAML; options override it", rich_help_panel="Recipe"),
    **RECIPE_FIELDS,
}


def recipe_of(context: typer.Context, fields: dict[str, Any]) -> FinetuneConfig:
    """Build the recipe from fields and from the options that are given, which override them."""
    options = {name: context.params[name] for name in given(context) if name in RECIPE_FIELDS}
    try:
        return FinetuneConfig(**{**fields, **options})
    except RetrofitError as error:
        raise WrongUsage(str(error)) from error


def takes(*groups: Options, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Decorate a command with the options of some groups, after its own. The command reads them from its context."""
    options = {name: option for group in groups for name, option in group.items() if name not in without}
    if only:
        options = {name: options[name] for name in only}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                command(*args, **{name: value for name, value in kwargs.items() if name not in options})
            except RetrofitError as error:
                if not str(error).startswith(f"{kwargs.get('config')}: "):  # a file has fields, not options
                    error.args = (as_options(str(error), signature.parameters),)
                raise

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


def as_options(text: str, names: Iterable[str]) -> str:
    """Replace arguments in an error, ``bad_images="skip"``, by the command's options, ``--bad-images skip``."""

    def replaced(found: re.Match[str]) -> str:
        before, name, value = found.groups()
        name = name.removesuffix("_dir").replace("_", "-")  # output_dir is --output
        if value in ("=True", "=False"):
            return f"{before}--{'no-' * (value == '=False')}{name}"
        return " ".join([f"{before}--{name}", *filter(None, [value[1:].strip('"')])])

    known = sorted({*names, "output_dir"}, key=len, reverse=True)
    longer = "|".join(name for name in known if "_" in name)
    value = r"=(?:\"[^\"]*\"|\{[^}]*\}|\.\.\.|[^\s,;:()]+)"
    text = re.sub(rf"(?<![\w./-])()({'|'.join(known)})({value})", replaced, text)  # batch_size=8
    text = re.sub(rf"(^|; )({'|'.join(known)})()(?=: )", replaced, text)  # lr: what is wrong with it
    return re.sub(rf"(?<![\w./-])()({longer})()(?![\w/=]|\.\w)", replaced, text)


def se_options(context: typer.Context) -> dict[str, Any]:
    """Return the arguments for ``add_se`` from a command's options."""
    values = {name: context.params[name] for name in SE_OPTIONS if name in context.params}
    return {**values, **{name: list(values[name]) if values[name] else None for name in ("include", "exclude", "at")}}


def given(context: typer.Context) -> list[str]:
    """Return the options and arguments that are given on the command line, by their names in the code."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def check_weights(context: typer.Context) -> None:
    """Raise an error if the options for the initial weights contradict each other."""
    if context.params["pretrained"] and context.params["checkpoint"] is not None:
        raise typer.BadParameter("give --pretrained or --checkpoint, not both")
    if context.params["remap"] and context.params["checkpoint"] is None:
        raise typer.BadParameter("--remap applies to a --checkpoint; give one, too")


def refuse_for_folder(context: typer.Context, *more: str) -> None:
    """Raise an error if options of the retrofit, or ``more``, are given for a network that is already retrofitted."""
    wrong = [f"--{name.replace('_', '-')}" for name in given(context) if name in (*SE_OPTIONS, *more)]
    if wrong:
        raise typer.BadParameter(f"{', '.join(wrong)}: the network in the folder is built and retrofitted already")


def example_of(size: str) -> torch.Tensor:
    """Return a batch of two inputs of a size such as ``3x224x224``; only its shape is read."""
    import torch

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        raise typer.BadParameter(f"{size!r} is not a size such as 3x224x224", param_hint="--input-size")
    return torch.empty(2, *map(int, size.split("x")), device="meta")
