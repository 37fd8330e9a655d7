from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import make_cifar10, make_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--epochs", "1", "--image-size", "32"]


def best(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("best validation accuracy")).split()[3]


# The arguments of each example, and what its printout must hold
RUNS: dict[str, tuple[list[str], Callable[[str], bool]]] = {
    "finetune_imagefolder.py": (["pictures", *SMALL], lambda said: f"loaded again: {best(said)}" in said),
    "finetune_cifar10.py": (["--root", ".", *SMALL], lambda said: "in epoch 1, stopped by epochs" in said),
    "finetune_se_only.py": (["--epochs", "1"], lambda said: said.count(": True") == 2),
    "finetune_multi_gpu.py": (["--epochs", "1", "--image-size", "16"], lambda said: bool(best(said))),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("finetune_*.py")))
def test_each_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, holds = RUNS[name]
    make_folder(tmp_path / "pictures")
    make_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # other images, other sums
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert holds(capsys.readouterr().out)
