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

HERE = Path(__file__).parent
# With frozen statistics and nothing random in the network two processes compute what one does, to rounding
RECIPE = {
    "epochs": 2,
    "freeze_bn": True,
    "optimizer": "sgd",
    "lr": 0.005,
    "clip_grad": None,  # clipping would hide a wrong factor
    "grad_accum_steps": 2,
    "patience": 2,
}


def torchrun(processes: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]


def launch(
    processes: int, output: Path, fields: dict[str, Any], *flags: str, **env: str
) -> subprocess.CompletedProcess[str]:
    launcher = torchrun(processes) if processes > 1 else []
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, str(HERE / "run_tiny.py"), str(output), json.dumps(fields), *flags],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def read(output: Path) -> tuple[list[float], list[dict[str, Any]], dict[str, torch.Tensor]]:
    curve = [json.loads(line)["loss"] for line in (output / "updates.jsonl").read_text().splitlines()]
    history = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return curve, history, load_file(output / "best" / "weights.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    done = launch(1, output, {**RECIPE, "batch_size": 32})
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.sweep
def test_two_processes_follow_the_loss_curve_of_one_with_the_doubled_batch(one_process: Path, tmp_path: Path) -> None:
    done = launch(2, tmp_path, {**RECIPE, "batch_size": 16})
    assert done.returncode == 0, done.stderr
    (curve, history, weights), (curve2, history2, weights2) = read(one_process), read(tmp_path)
    assert len(curve) == 8
    assert curve2 == pytest.approx(curve, rel=1e-4)
    assert curve[-1] < curve[0]
    for row, row2 in zip(history, history2, strict=True):
        assert row2["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)
        assert row2["val_accuracy"] == row["val_accuracy"]
    for key, value in weights.items():
        torch.testing.assert_close(weights2[key], value, rtol=1e-3, atol=1e-5)
    # one process prints
    assert done.stdout.count("best validation accuracy") == 1


@pytest.mark.sweep
def test_two_processes_resume_to_the_same_weights(tmp_path: Path) -> None:
    fields = {**RECIPE, "batch_size": 16, "freeze_bn": False, "mixup": 0.4, "checkpoint_minutes": 0.0, "ema_decay": 0.9}
    whole = launch(2, tmp_path / "whole", fields)
    assert whole.returncode == 0, whole.stderr
    stopped = launch(2, tmp_path / "broken", fields, SE_TEST_DIE_AT="6")
    assert stopped.returncode != 0
    assert json.loads((tmp_path / "broken" / "last" / "training.json").read_text())["progress"]["updates"] in (5, 6)
    again = launch(2, tmp_path / "broken", fields, "resume")
    assert again.returncode == 0, again.stderr
    for folder in ("last", "best"):
        a, b = (load_file(tmp_path / run / folder / "weights.safetensors") for run in ("whole", "broken"))
        assert all(torch.equal(a[key], b[key]) for key in a), folder


@pytest.mark.sweep
def test_a_run_is_not_resumed_by_another_number_of_processes(one_process: Path) -> None:
    done = launch(2, one_process, {**RECIPE, "batch_size": 32}, "resume")
    assert done.returncode != 0
    assert "was started with 1 processes, now running with 2" in done.stderr


@pytest.mark.sweep
def test_two_processes_train_a_network_with_unused_parameters_where_they_are_told_so(tmp_path: Path) -> None:
    fields = {"epochs": 1, "batch_size": 16}
    assert launch(2, tmp_path / "not told", fields, "unused").returncode != 0
    told = launch(2, tmp_path / "told", {**fields, "find_unused_parameters": True}, "unused")
    assert told.returncode == 0, told.stderr


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("number", "end", "group"),
    # as a cluster's scheduler ends a job, and as a terminal passes Ctrl-C on
    [(signal.SIGTERM, "SystemExit(143)", False), (signal.SIGINT, "KeyboardInterrupt()", True)],
    ids=["SIGTERM to torchrun", "SIGINT to all"],
)
def test_a_signal_to_torchrun_or_to_all_writes_a_checkpoint(
    tmp_path: Path, number: signal.Signals, end: str, group: bool
) -> None:
    output, ends = tmp_path / "run", tmp_path / "ends"
    ends.mkdir()
    fields = {"epochs": 500, "batch_size": 16, "workers": 1, "checkpoint_minutes": 100.0}
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    process = subprocess.Popen(
        [sys.executable, *torchrun(2), str(HERE / "run_tiny.py"), str(output), json.dumps(fields)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SE_TEST_ENDS": str(ends)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    updates = output / "updates.jsonl"
    while process.poll() is None and not (updates.exists() and len(updates.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, number)
    said = process.communicate(timeout=120)[0]
    # torchrun itself ends with 1, whatever its processes end with
    assert {rank.name: rank.read_text() for rank in ends.iterdir()} == {"0": end, "1": end}, said
    assert said.count("the checkpoint in") == 1
    assert json.loads((output / "last" / "training.json").read_text())["progress"]["updates"] >= 3
