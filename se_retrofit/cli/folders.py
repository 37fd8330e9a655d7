"""The folder of a saved network: what is written beside it, and what that of a run tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["beside", "run_settings", "training_data_of"]

# of a run's recipe: what decides how its network is evaluated
SETTINGS = ("image_size", "batch_size", "precision", "multi_label")


def beside(folder: Path, ending: str) -> Path:
    """A path next to a folder, of its name and an ending; the folder may be given as ``.``."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    return named.with_name(named.name + ending)


def run_settings(saved: Path) -> dict[str, Any]:
    """How the run that a saved network is the result of evaluated it; nothing where it is not in a run's folder."""
    from ..finetune import FinetuneConfig

    file = saved.parent / "config.yaml"
    if saved.name != "best" or not file.is_file():
        return {}
    recipe = FinetuneConfig.from_yaml(file).to_dict()
    return {name: recipe[name] for name in SETTINGS}


def training_data_of(saved: Path) -> dict[str, Any] | None:
    """The fingerprint of the data that a saved network was trained on, where it is in a run's folder whose ``run.yaml`` tells
    it."""
    from ..finetune.checkpoint import BEST, LAST, RUN, written

    if saved.name not in (BEST, LAST):
        return None
    experiment = written(saved.parent / RUN).get("experiment")
    found = experiment.get("training data") if isinstance(experiment, dict) else None
    return found if isinstance(found, dict) else None
