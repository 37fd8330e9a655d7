"""The fields of a recipe, and reading one with a check of every field."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import RetrofitError, brief
from ..plaindata import read_json
from ..plan import Plan
from .atomic import settled

FORMAT = 2
WEIGHTS = "weights.safetensors"
RECIPE = "recipe.json"

RECIPE_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "base": (dict, type(None)),
    "base_note": (str,),
    "add_se": (dict, type(None)),
    "plan": (dict, type(None)),
    "tied": (dict,),
    "images": (dict, type(None)),
    "versions": (dict,),
}
IMAGE_FIELDS: dict[str, tuple[type, ...]] = {
    "input_size": (list,),
    "mean": (list,),
    "std": (list,),
    "interpolation": (str,),
    "crop_pct": (float, int),
    "crop_mode": (str,),
    "classes": (list, type(None)),
    "multi_label": (bool,),
}
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
    """Read the recipe of a folder, and check it field by field."""
    recipe = read_json(folder / RECIPE)
    check_fields(recipe, RECIPE_FIELDS, folder / RECIPE)
    if recipe["base"] is not None:
        check_fields(recipe["base"], {"library": (str,), "name": (str,), "kwargs": (dict,)}, f"{folder / RECIPE}: base")
    if (recipe["plan"] is None) != (recipe["add_se"] is None):
        raise RetrofitError(f"{folder / RECIPE}: add_se and plan must both be given or both be null")
    if recipe["plan"] is not None:
        read_plan(recipe["plan"], recipe["add_se"], folder / RECIPE)
    check_names(recipe["tied"], "tied", folder / RECIPE)
    check_names(recipe["versions"], "versions", folder / RECIPE)
    if recipe["images"] is not None:
        _check_images(recipe["images"], f"{folder / RECIPE}: images")
    return dict(recipe)


def read_plan(data: dict[str, Any], options: dict[str, Any] | None, where: object) -> Plan:
    """Build a plan from a file that holds its options separately."""
    try:
        return Plan.from_dict({**data, "options": options})
    except RetrofitError as error:
        raise RetrofitError(f"{where}: {error}") from error


def check_names(names: dict[str, Any], field: str, where: object) -> None:
    if not all(isinstance(v, str) for v in names.values()):
        raise RetrofitError(f"{where}: {field} must map names to names")


def _check_images(images: dict[str, Any], where: str) -> None:
    check_fields(images, IMAGE_FIELDS, where)
    size, crop, classes = images["input_size"], images["crop_pct"], images["classes"]
    if len(size) != 3 or not all(type(n) is int and 0 < n <= 2**16 for n in size):
        raise RetrofitError(f"{where}: input_size must be channels, height and width, got {brief(size)}")
    for name in ("mean", "std"):
        if not images[name] or not all(type(n) in (int, float) and math.isfinite(n) for n in images[name]):
            raise RetrofitError(f"{where}: {name} must be a number for each channel, got {brief(images[name])}")
    if not 0 < crop <= 100:
        raise RetrofitError(f"{where}: crop_pct must be a part above 0, got {brief(crop)}")
    if images["interpolation"] not in INTERPOLATIONS:
        raise RetrofitError(
            f"{where}: interpolation must be one of {', '.join(INTERPOLATIONS)}, got {brief(images['interpolation'])}"
        )
    if classes is not None and not all(isinstance(name, str) for name in classes):
        raise RetrofitError(f"{where}: classes must be names, got {brief(classes)}")


def check_fields(data: Any, fields: dict[str, tuple[type, ...]], where: object, newest: int = FORMAT) -> None:
    """Raise an error unless ``data`` is a mapping with exactly these fields, of these types, and of a known format."""
    if not isinstance(data, dict):
        raise RetrofitError(f"{where} must hold a mapping, got {type(data).__name__}")
    if "format" in fields:
        # Checked first, because a newer format may well have other fields.
        version = data.get("format")
        if isinstance(version, int) and version > newest:
            raise RetrofitError(
                f"{where} is of format {version}, newer than this se-retrofit {version_of('se-retrofit')} reads "
                f"(up to {newest}); upgrade: pip install -U se-retrofit"
            )
        if type(version) is int and version < newest:
            raise RetrofitError(
                f"{where} is of format {version}, which se-retrofit {version_of('se-retrofit')} no longer reads (it reads "
                f"{newest}); load it with the version that wrote it, and save its state dict"
            )
    missing, unknown = sorted(fields.keys() - data.keys()), sorted(data.keys() - fields.keys())
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise RetrofitError(f"{where} does not match format {newest}; {'; '.join(parts)}")
    for name, types in fields.items():
        if not isinstance(data[name], types) or (isinstance(data[name], bool) and bool not in types):
            raise RetrofitError(f"{where}: {name} is of type {type(data[name]).__name__}, expected {types[0].__name__}")


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"  # running from a checkout that is not installed
