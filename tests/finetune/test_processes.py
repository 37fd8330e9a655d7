"""Two processes train as one does, resume and stop together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from two_processes import RECIPE, train

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
}  # fmt: skip
pytestmark = pytest.mark.sweep


def torchrun() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [sys.executable, *launcher]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that ``two_processes.py`` trains, and of one process's run beside it."""
    root = tmp_path_factory.mktemp("processes")
    train(root / "one", {**RECIPE, "batch_size": 16})
    done = subprocess.run(
        [*torchrun(), str(HERE / "two_processes.py"), str(root)], env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (root / "said.txt").write_text(done.stdout)
    return root


def told(root: Path, name: str) -> list[str]:
    return [json.loads((root / f"told.{rank}.json").read_text())[name] for rank in (0, 1)]


def read(output: Path) -> tuple[list[float], list[dict[str, Any]], dict[str, torch.Tensor]]:
    curve = [json.loads(line)["loss"] for line in (output / "updates.jsonl").read_text().splitlines()]
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return curve, history, load_file(output / "best" / "weights.safetensors")


def test_two_processes_follow_the_loss_curve_of_one_with_the_doubled_batch(root: Path) -> None:
    (curve, history, weights), (curve2, history2, weights2) = read(root / "one"), read(root / "two")
    assert len(curve) == 8
    assert curve2 == pytest.approx(curve, rel=1e-4)
    assert curve[-1] < curve[0]
    for row, row2 in zip(history, history2, strict=True):
        assert row2["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)
        assert row2["val_accuracy"] == row["val_accuracy"]
    for key, value in weights.items():
        torch.testing.assert_close(weights2[key], value, rtol=1e-3, atol=1e-5)
    assert (root / "said.txt").read_text().count("best validation accuracy") == 1  # one process prints


def test_two_processes_resume_to_the_same_weights_and_not_as_another_number(root: Path) -> None:
    assert told(root, "broken") == ["Broken: ", "Broken: "]
    for folder in ("last", "best"):
        a, b = (load_file(root / run / folder / "weights.safetensors") for run in ("whole", "broken"))
        assert all(torch.equal(a[key], b[key]) for key in a), folder
    assert all("processes: 1 then, 2 now" in said for said in told(root, "other number"))


def test_unused_parameters_are_trained_around_where_it_is_told_so(root: Path) -> None:
    assert told(root, "told of unused") == ["", ""]
    assert all("find_unused_parameters" in said for said in told(root, "unused"))


def test_a_signal_to_torchrun_writes_a_checkpoint(tmp_path: Path) -> None:
    """As a cluster's scheduler ends a job."""
    output = tmp_path / "run"
    arguments = ["--data", "digits", "--image-size", "16", "--cpu", "--epochs", "500", "--log-every", "1"]
    process = subprocess.Popen(
        [*torchrun(), "-m", "se_retrofit", "finetune", "timm/test_resnet", *arguments, "--output", str(output)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    updates = output / "updates.jsonl"
    while process.poll() is None and not (updates.exists() and len(updates.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert said.count("stopped; ") == 1, said
    assert json.loads((output / "last" / "training.json").read_text())["progress"]["updates"] >= 3
