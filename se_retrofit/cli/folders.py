"""What the folder of a run tells of the network in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["run_settings", "training_data_of"]

# of a run's recipe: what decides how its network is evaluated
SETTINGS = ("image_size", "batch_size", "precision", "multi_label")


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
