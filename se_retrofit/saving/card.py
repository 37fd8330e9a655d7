"""The model card of a saved network: what it is, how good it is, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import timm

from ..errors import RetrofitError
from ..models import Base
from ..plaindata import read_json
from ..tables import few
from .base import named_base
from .recipe import WEIGHTS, read_recipe

SHOWN_CLASSES = 20
METRICS = ("accuracy", "top5", "precision", "recall", "f1", "map", "loss")  # in a run's history, after val_


def card_text(folder: Path, repo_id: str, license: str | None = None) -> str:
    """Return the model card of the network in a folder in the hub's format: Markdown with YAML front matter."""
    recipe, measured = read_recipe(folder), _measured(folder)
    plan, base, images = recipe["plan"], named_base(recipe, folder), recipe["images"]
    data = huggingface_hub.ModelCardData(
        library_name="se_retrofit",
        tags=[*(() if plan is None else ("squeeze-and-excitation", "channel-attention")), "pytorch"],
        license=license,
        pipeline_tag=None if images is None else "image-classification",
        base_model=str(base) if base is not None and base.library == "timm" and "." in base.name else None,
        metrics=[name for name in ("accuracy", "f1") if name in measured] or None,
    )
    options = {key: value for key, value in (recipe["add_se"] or {}).items() if value not in (None, [])}
    given = ", ".join(
        f"{key}={value.get('callable') if isinstance(value, dict) else repr(value)}" for key, value in options.items()
    )
    bare = "" if base is not None else ", base=the_bare_network"
    bare += ", attention=the_same" if isinstance(options.get("attention"), dict) else ""
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    table = "This network has no SE." if plan is None else f"Made by `add_se(model, {given})`:\n\n```text\n{plan}\n```"
    what = "A network" if base is None else f"A copy of {base}"
    if plan is not None:
        what += f" with {'Squeeze-and-Excitation' if plan.what == 'SE' else f'{plan.what} modules'} in its convolutional blocks"
    importing, using = "", ""
    if images is not None:
        importing = "from se_retrofit.finetune import predict\n"
        using = 'print(*predict(model, ["image.jpg"], top=3))\n'
    rows = [*_about(base, images, (folder / WEIGHTS).stat().st_size, license), *_scores(measured)]
    cells = [(name, " ".join(value.split()).replace("|", "\\|")) for name, value in rows]
    facts = "\n".join(f"| {name} | {value} |" for name, value in cells)
    return f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

{what}.

| | |
| --- | --- |
{facts}

```python
{importing}from se_retrofit.saving import from_pretrained

model = from_pretrained("{repo_id}"{bare})
{using}```

{table}

Saved with {versions}.
"""


def _about(
    base: Base | None, images: dict[str, Any] | None, size: int, license: str | None
) -> Iterator[tuple[str, str]]:
    """Yield the rows about the base, the licence, the size, and the classes and images that ``predict`` needs."""
    theirs = None
    if base is not None and base.library == "timm":
        with suppress(RuntimeError):  # raised for a tag that timm does not know
            theirs = getattr(timm.get_pretrained_cfg(base.name), "license", None)
    hint = f"; timm names {theirs} for the base's pretrained weights" if theirs else ""
    arguments = "" if base is None or not base.kwargs else f" with {base.kwargs}"
    yield "base", "not known" if base is None else f"{base}{arguments}"
    yield "licence", license or f"not given{hint}"
    yield "weights", f"{size / 1e6:,.1f} MB"
    if images is None:
        return
    names = images["classes"] or []
    yield "classes", f"{len(names):,}: {few(names, SHOWN_CLASSES)}" if names else "without names"
    if images["multi_label"]:
        yield "labels", "an image may have several"
    crop = f"{images['interpolation']}, crop {images['crop_pct']:g} ({images['crop_mode']})"
    yield "images", f"{' x '.join(map(str, images['input_size']))}, {crop}, mean {images['mean']}, std {images['std']}"


def _scores(measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    of = f" on {measured['images']:,} validation images" if "images" in measured else " in validation"
    for name in METRICS:
        if name in measured:
            value = measured[name]
            yield name + of, f"{value:.4f}" if name == "loss" else f"{value:.2%}"


def _measured(folder: Path) -> dict[str, Any]:
    """Return the scores of the best epoch of the run that wrote a folder; empty if none did, or it was moved."""
    try:
        state = read_json(folder.parent / "last" / "training.json") if folder.name == "best" else {}
        progress = state["progress"]
        (row,) = (row for row in progress["history"] if row["epoch"] == progress["best_epoch"])
        scores = {name: float(row[f"val_{name}"]) for name in METRICS if f"val_{name}" in row}
        images = state["experiment"]["validation data"]["length"]
    except (RetrofitError, KeyError, TypeError, ValueError):
        return {}
    return {**scores, "images": images} if isinstance(images, int) else scores
