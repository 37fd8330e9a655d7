"""The fields of a recipe, reading one with a check of every field, and carrying out its plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from ..attention import Attention
from ..errors import RetrofitError, brief
from ..plaindata import read_as, read_json
from ..plan import Plan, Site
from ..retrofit import add_se
from .atomic import settled

FORMAT = 2
WEIGHTS = "weights.safetensors"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Named:
    """The base of a network: a library, a name in it, and arguments."""

    library: str
    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Images:
    """How images are prepared, and the names of their classes."""

    input_size: list[int]
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str
    classes: list[str] | None
    multi_label: bool


@dataclass(frozen=True)
class Recipe:
    """The fields of a recipe."""

    format: int
    base: Named | None
    base_note: str
    add_se: dict[str, Any] | None
    plan: dict[str, Any] | None
    tied: dict[str, str]
    images: Images | None
    versions: dict[str, str]


INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "random")  # the names in timm


def network_in(folder: Path) -> Path:
    """Return the folder itself, or its ``best/`` if it is the folder of a run."""
    for candidate in (folder, folder / "best"):
        if (settled(candidate) / RECIPE).is_file():
            return candidate
    if not settled(folder).is_dir():
        raise RetrofitError(f"no folder {folder}; give the folder that save_retrofitted or a fine-tune wrote")
    raise RetrofitError(
        f"{folder} holds no network written by save_retrofitted, add, finetune or fold; there is no {RECIPE} in it "
        f"or in {folder / 'best'}"
    )


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe of a folder, and check it field by field; its plan is returned as a ``Plan``."""
    file = folder / RECIPE
    recipe = read_json(file)
    checked: Recipe = read_fields(recipe, Recipe, f"{file}: recipe")
    if (checked.plan is None) != (checked.add_se is None):
        raise RetrofitError(f"{file}: add_se and plan must both be given or both be null")
    if checked.images is not None:
        _check_images(checked.images, f"{file}: images")
    plan = None if checked.plan is None else read_plan(checked.plan, checked.add_se, file)
    return {**recipe, "plan": plan}


def read_plan(data: dict[str, Any], options: dict[str, Any] | None, where: object) -> Plan:
    """Build a plan from a file that holds its options separately."""
    try:
        return Plan.from_dict({**data, "options": options})
    except RetrofitError as error:
        raise RetrofitError(f"{where}: {error}") from error


def carried_out(
    model: nn.Module, plan: Plan, where: object, example_inputs: Any, attention: Attention | None, *, inplace: bool
) -> nn.Module:
    """Retrofit a bare network by a saved plan, which ``add_se`` checks, with the attention if it can't be saved."""
    try:
        return add_se(model, plan=plan, example_inputs=example_inputs, attention=attention or "se", inplace=inplace)
    except Warning:
        raise
    except Exception as error:  # the plan comes from a file, and the base runs on inputs chosen by it
        raise RetrofitError(f"the retrofit of {where} can't be repeated on this base: {error}") from error


def belongs_to(key: str, sites: tuple[Site, ...]) -> bool:
    return any(key == site.path or key.startswith(f"{site.path}.") for site in sites)


def _check_images(images: Images, where: str) -> None:
    if len(images.input_size) != 3 or not all(0 < n <= 2**16 for n in images.input_size):
        raise RetrofitError(f"{where}: input_size must be channels, height and width, got {brief(images.input_size)}")
    for name, numbers in (("mean", images.mean), ("std", images.std)):
        if not numbers or not all(map(math.isfinite, numbers)):
            raise RetrofitError(f"{where}: {name} must be a number for each channel, got {brief(numbers)}")
    if not 0 < images.crop_pct <= 100:
        raise RetrofitError(f"{where}: crop_pct must be a part above 0, got {brief(images.crop_pct)}")
    if images.interpolation not in INTERPOLATIONS:
        known, given = ", ".join(INTERPOLATIONS), brief(images.interpolation)
        raise RetrofitError(f"{where}: interpolation must be one of {known}, got {given}")


def read_fields(data: Any, cls: type, where: str, newest: int = FORMAT) -> Any:
    """Read data as a dataclass, after checking its format, because another format may well have other fields."""
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is int and version != newest:
        only = f"se-retrofit {version_of('se-retrofit')} reads {newest}"
        raise RetrofitError(
            f"{where} is of format {version}, newer than this {only}; upgrade: pip install -U se-retrofit"
            if version > newest
            else f"{where} is of format {version}, and {only} alone; load it with the version that wrote it, and save its "
            "state dict"
        )
    return read_as(data, cls, where)


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"  # running from a checkout that is not installed
