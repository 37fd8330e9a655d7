from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import make_cifar10, make_folder

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def script(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.mark.sweep
def test_every_example_has_a_test() -> None:
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("finetune_*.py") if f'"{path.name}"' not in tested] == []


@pytest.mark.sweep
def test_the_image_folder_example_runs(run: Callable[..., str], tmp_path: Path) -> None:
    make_folder(tmp_path / "pictures")
    said = run("finetune_imagefolder.py", "pictures", "--epochs", "1", "--image-size", "32")
    best = next(line for line in said.splitlines() if line.startswith("best validation accuracy"))
    assert best.split()[3] == said.splitlines()[-1].removeprefix("loaded again: ")


@pytest.mark.sweep
def test_the_cifar10_example_runs(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # other images, other sums
    said = run("finetune_cifar10.py", "--root", ".", "--epochs", "1", "--image-size", "32")
    assert "in epoch 1, stopped by epochs" in said


@pytest.mark.sweep
def test_the_se_only_example_runs(run: Callable[..., str]) -> None:
    said = run("finetune_se_only.py", "--epochs", "1")
    assert "all else as it was: True" in said
    assert "base and file give the same accuracy: True" in said


@pytest.mark.sweep
def test_the_multi_gpu_example_runs_with_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "finetune_multi_gpu.py"), "--epochs", "1", "--image-size", "16"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.count("best validation accuracy") == 1
