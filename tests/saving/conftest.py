from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def saved(sound: Path, tmp_path: Path) -> Path:
    """A copy of the folder that each file of tests makes once, to be edited."""
    return Path(shutil.copytree(sound, tmp_path / "saved"))
