"""The folder of a saved network: paths beside it, and what the folder of a run records about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# the fields of a run's recipe that decide how its network is evaluated
SETTINGS = ("image_size", "batch_size", "precision", "multi_label")


def beside(folder: Path, ending: str) -> Path:
    """Return the path beside a folder that is its name plus an ending; the folder may be given as ``.``."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    return named.with_name(named.name + ending)


def run_settings(saved: Path) -> dict[str, Any]:
    """Return the settings with which a run evaluated the network that it saved; empty if no run saved it."""
    from ..finetune import FinetuneConfig

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
