from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
from networks import randomise_se

from se_retrofit import add_se, save_retrofitted
from se_retrofit.models import IMAGES


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's smallest network, saved with what is known of its images."""
    network = randomise_se(add_se(timm.create_model("test_resnet", num_classes=3)))
    vars(network)[IMAGES] = {
        "input_size": [3, 64, 48], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.875,
        "crop_mode": "center", "classes": ["a|b", "c", "d"], "multi_label": False,
    }  # fmt: skip
    return save_retrofitted(network, tmp_path_factory.mktemp("sound") / "saved")


@pytest.fixture
def saved(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be edited."""
    return Path(shutil.copytree(sound, tmp_path / "saved"))
