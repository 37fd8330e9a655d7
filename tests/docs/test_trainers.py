"""The examples in other people's trainers run, train SE, and find it again in what the trainer saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# what each needs, and what it must say
TRAINERS = {
    "trainer_detection.py": (None, ["8 SE modules", "the loss has fallen: True", "same boxes: True"]),
    "trainer_lightning.py": ("lightning", ["same outputs: True", "right: 100%"]),
    "trainer_monai.py": ("monai", ["4 SE modules", "the loss has fallen: True", "same mask: True"]),
    "trainer_segmentation.py": (None, ["16 SE modules", "the loss has fallen: True", "same scores: True"]),
    "trainer_transformers.py": ("transformers", ["same outputs: True", "right: 100%"]),
    "trainer_ultralytics.py": ("ultralytics", ["DetectionModel with 10 SE modules", "the base's weights: True"]),
}


def test_every_trainer_example_has_a_test() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("trainer_*.py")) == sorted(TRAINERS)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_a_retrofitted_network_trains_and_is_saved_by(name: str, tmp_path: Path) -> None:
    package, said = TRAINERS[name]
    if package is not None:
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for line in said:
        assert line in done.stdout
