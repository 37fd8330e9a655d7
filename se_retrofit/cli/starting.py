"""What commands start from: a network, data and a recipe; and what the folder of a run records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict

from ..errors import RetrofitError
from ..finetune.config import FinetuneConfig
from ..plaindata import parse_yaml
from .app import WrongUsage
from .options import check_weights, recipe_of, refuse_for_folder, se_options

if TYPE_CHECKING:
    from torch import nn

    from ..finetune import NamedData


# the fields of a run's recipe that decide how its network is evaluated
SETTINGS = ("image_size", "batch_size", "precision", "multi_label")


class Start(BaseModel):
    """The network that a command trains, as given by its options; a folder is stored by its absolute path."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    pretrained: bool
    checkpoint: str | None
    remap: Literal["order"] | None = None
    arg: list[str]
    plain: bool
    se: dict[str, Any]

    @classmethod
    def of(cls, context: typer.Context) -> Start:
        options = context.params
        model, checkpoint = options["model"], options["checkpoint"]
        if Path(model).is_dir():
            refuse_for_folder(context, "plain", "pretrained", "checkpoint", "remap", "arg")
        check_weights(context)
        return cls(
            model=absolute(model),
            pretrained=options["pretrained"],
            checkpoint=None if checkpoint is None else str(checkpoint.resolve()),
            remap=options["remap"],
            arg=list(options["arg"] or []),
            plain=options.get("plain", False),
            se=se_options(context),
        )

    def build(self) -> nn.Module:
        """Build the network without SE, or load it if it is a folder."""
        from ..models import Base, load_checkpoint
        from ..saving import load_retrofitted

        if Path(self.model).is_dir():
            return load_retrofitted(self.model)
        network = Base.of(self.model, **named_values(self.arg)).build(self.pretrained)
        if self.checkpoint is not None:
            load_checkpoint(network, Path(self.checkpoint), remap=self.remap)
        return network

    def network(self, recipe: FinetuneConfig) -> nn.Module:
        """Build the network, retrofitted unless it is plain or from a folder."""
        import torch

        from ..retrofit import add_se

        # Seeded, so that a resumed run and all processes start from the same weights
        torch.manual_seed(recipe.seed)
        network = self.build()
        if not self.plain and not Path(self.model).is_dir():
            network = add_se(network, **self.se, inplace=True)
        return network


def absolute(name: str) -> str:
    """Return a folder by its absolute path, and any other name as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def beside(folder: Path, ending: str) -> Path:
    """Return the path beside a folder that is its name plus an ending; the folder may be given as ``.``."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    return named.with_name(named.name + ending)


def run_settings(saved: Path) -> dict[str, Any]:
    """Return the settings with which a run evaluated the network that it saved; empty if no run saved it."""
    file = saved.parent / "config.yaml"
    if saved.name != "best" or not file.is_file():
        return {}
    recipe = FinetuneConfig.from_yaml(file).to_dict()
    return {name: recipe[name] for name in SETTINGS}


def training_data_of(saved: Path) -> dict[str, Any] | None:
    """Return the fingerprint of a saved network's training data, from the ``run.yaml`` of its run, if there is one."""
    from ..finetune.checkpoint import BEST, LAST, RUN, written

    if saved.name not in (BEST, LAST):
        return None
    experiment = written(saved.parent / RUN).get("experiment")
    found = experiment.get("training data") if isinstance(experiment, dict) else None
    return found if isinstance(found, dict) else None


def check_outside(output: Path, data: str) -> None:
    """Raise an error if the output folder is inside the data folder, where it would later be read as a class."""
    if Path(data).is_dir() and output.resolve().is_relative_to(Path(data).resolve()):
        raise RetrofitError(
            f"{output} is in the data folder {data}, where its pictures would be taken for those of a class; "
            "give another folder with --output"
        )


def named_values(settings: list[str]) -> dict[str, Any]:
    """Parse the ``NAME=VALUE`` pairs of ``--arg``; values are read as YAML."""
    read = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise WrongUsage(f"--arg takes NAME=VALUE, got {setting!r}")
        read[name.strip().replace("-", "_")] = parse_yaml(value, f"the value of --arg {setting!r}")
    return read


def read_config(context: typer.Context) -> FinetuneConfig:
    """Read the recipe from its file, and let the options override it."""
    file = context.params["config"]
    fields = FinetuneConfig.from_yaml(file).to_dict() if file is not None else {}
    return recipe_of(context, fields)


def open_data(
    context: typer.Context, data: str, recipe: FinetuneConfig, root: Path | None = None, limit: int | None = None
) -> tuple[NamedData, FinetuneConfig]:
    """Open the data, and return it with the recipe, completed by the number of classes."""
    from ..finetune import load_data
    from ..finetune.datasets import limited
    from ..finetune.engine import processes

    where = {"root": root or context.params["data_root"], "download": context.params["download"]}
    parts = load_data(data, **where, image_size=recipe.image_size)
    told = processes()[0] == 0  # by one of several
    if parts.note and told:
        typer.echo(parts.note)
    if (limit := limit or context.params["limit"]) is not None:
        parts = replace(parts, train=limited(parts.train, limit), val=limited(parts.val, limit))
        few = f"{len(parts.train):,} images to train on, {len(parts.val):,} to validate on"
        if told:
            typer.echo(f"at most {limit:,} of each class are taken: {few}")
    if recipe.num_classes is None:
        if parts.num_classes is None:
            raise RetrofitError(f"the number of classes of {data} is not known: give it with --num-classes")
        recipe = recipe.replace(num_classes=parts.num_classes)
    return parts, recipe


def default_name(model: str, data: str, details: Any) -> str:
    """Return a folder name for a run; runs whose ``details`` differ get different names."""
    from ..finetune.experiment import digest, plain

    return f"{model}-{Path(data).name}".replace("/", "-").replace(":", "-") + f"-{digest(plain(details))[:8]}"
