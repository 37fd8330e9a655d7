"""Ctrl-C and SIGTERM: a checkpoint, the right exit code, and a word at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import Dataset

from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, NamedData, finetune
from se_retrofit.finetune.engine import Interrupt

HERE = Path(__file__).parent
Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]


def progress_in(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "last" / "training.json").read_text())["progress"]
    return found


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        # by its own handler Python ends itself by the signal, which a shell tells as 130
        (signal.SIGINT, -signal.SIGINT),
    ],
)
def test_a_signal_to_the_process_group_with_loading_workers_writes_a_checkpoint(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    fields = {"epochs": 500, "checkpoint_minutes": 100.0, "workers": 2}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "run_tiny.py"), str(tmp_path), json.dumps(fields)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    updates = tmp_path / "updates.jsonl"
    while process.poll() is None and not (updates.exists() and len(updates.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    assert "stopping: " in said
    assert progress_in(tmp_path)["updates"] >= 3


LOADS = """
import multiprocessing, os, signal, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
from se_retrofit.finetune.workers import begin_worker

def begin(worker):
    begin_worker(worker)
    if sys.argv[2] == "killed" and worker == 1:
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        time.sleep(0.2)  # PyTorch's own watch of the main process begins after this, and takes its heir for it

if __name__ == "__main__":
    data = TensorDataset(torch.zeros(40, 1), torch.zeros(40))
    loader = DataLoader(data, 2, num_workers=2, worker_init_fn=begin, multiprocessing_context=sys.argv[1])
    batches = iter(loader)
    next(batches)
    if sys.argv[2] == "killed":
        time.sleep(100)
    # ends here with loading processes, as after an error
"""


@pytest.mark.sweep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no processes of this kind")
@pytest.mark.parametrize(
    ("context", "end"),
    [
        ("fork", "killed"),
        *(
            pytest.param(context, end, marks=pytest.mark.sweep)
            for context, end in [
                ("fork", "exits"), ("forkserver", "killed"), ("forkserver", "exits"), ("spawn", "killed"), ("spawn", "exits"),
            ]
        ),
    ],
)  # fmt: skip
def test_loading_processes_end_with_the_main_process(tmp_path: Path, context: str, end: str) -> None:
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    with subprocess.Popen(
        [sys.executable, str(script), context, end], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            process.communicate(timeout=120)  # the pipe is closed when the last process has ended
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 0)


class Interrupting(Dataset[Any]):
    """A data set that presses Ctrl-C at its nth reading of an item of the second half."""

    def __init__(self, data: Any, at: int) -> None:
        self.data, self.at, self.read = data, at, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        if self.read == self.at:
            signal.raise_signal(signal.SIGINT)
        return self.data[index]


FINGERPRINT = 16  # readings before the run begins


def test_ctrl_c_stops_after_the_update_that_is_under_way(
    network: Network, config: Config, digits: NamedData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = Interrupting(digits.train, FINGERPRINT + 2 * 32 + 5)  # in the third batch of eight
    recipe = config(log_every=100, checkpoint_minutes=100.0)
    with pytest.raises(KeyboardInterrupt):
        finetune(network(), data, config=recipe, output_dir=tmp_path)
    assert progress_in(tmp_path)["updates"] == 3
    assert "stopping: the update under way is finished" in capfd.readouterr().err


def test_ctrl_c_ends_a_validation_and_the_run_goes_on_to_the_same_result(
    network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    recipe = config(epochs=1, log_every=100, checkpoint_minutes=100.0, batch_size=25, ema_decay=0.9)
    whole = finetune(network(), digits.train, digits.val, config=recipe, quiet=True)
    val = Interrupting(digits.val, FINGERPRINT + 100 + 30)  # in the second batch after the epoch
    with pytest.raises(KeyboardInterrupt):
        finetune(network(), digits.train, val, config=recipe, output_dir=tmp_path, quiet=True)
    assert val.read <= FINGERPRINT + 100 + 50  # it did not go through the other half
    assert progress_in(tmp_path)["updates"] == 10
    again = finetune(network(), digits.train, digits.val, config=recipe, output_dir=tmp_path, resume=True, quiet=True)
    assert again.updates == whole.updates
    assert again.best_accuracy == whole.best_accuracy
    assert again.history[1]["train_loss"] == whole.history[1]["train_loss"]
    assert again.history[1]["val_loss"] == whole.history[1]["val_loss"]


@pytest.mark.sweep
def test_ctrl_c_when_the_run_is_over_is_raised_and_nothing_is_lost(
    network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    def late(facts: Facts) -> None:
        signal.raise_signal(signal.SIGINT)

    run = {"config": config(epochs=1), "output_dir": tmp_path, "quiet": True}
    with pytest.raises(KeyboardInterrupt):  # or a comparison would begin the next run
        finetune(network(), digits.train, digits.val, callbacks=Callbacks(after_training=late), **run)
    assert finetune(network(), digits.train, digits.val, resume=True, **run).stopped == "epochs"


def test_a_second_ctrl_c_is_patient_and_none_breaks_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Interrupt, "PATIENCE", 0.0)
    with Interrupt() as interrupt:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with interrupt.held():
            signal.raise_signal(signal.SIGINT)
        assert "another Ctrl-C stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
