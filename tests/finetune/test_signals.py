"""The library stops where it is told to and installs no handlers; the command line does, and exits as a shell expects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import network, trained
from torch.utils.data import Dataset

from se_retrofit.cli import signals
from se_retrofit.finetune import Callbacks, Facts, NamedData, Stopped

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}


def progress_in(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "last" / "training.json").read_text())["progress"]
    return found


@pytest.mark.sweep
def test_signals_to_the_process_group_with_loading_workers_write_a_checkpoint(tmp_path: Path) -> None:
    """A process for each signal; both start at once, as most of their time goes into imports."""
    ends = {signal.SIGTERM: 143, signal.SIGINT: 130}
    arguments = [
        "--data",
        "digits",
        "--image-size",
        "16",
        "--epochs",
        "500",
        "--cpu",
        "--workers",
        "1",
        "--log-every",
        "1",
    ]
    processes = {
        number: subprocess.Popen(
            [sys.executable, "-m", "se_retrofit", "finetune", "timm/test_resnet", *arguments, "--output", str(tmp_path / number.name)],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for number in ends
    }  # fmt: skip
    for number, process in processes.items():
        updates = tmp_path / number.name / "updates.jsonl"
        while process.poll() is None and not (updates.exists() and len(updates.read_text().splitlines()) >= 3):
            time.sleep(0.01)
        os.killpg(process.pid, number)
    for number, process in processes.items():
        said = process.communicate(timeout=60)[0]
        assert process.returncode == ends[number], said
        assert "stopping after this update" in said
        assert "Traceback" not in said
        assert progress_in(tmp_path / number.name)["updates"] >= 3


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
@pytest.mark.parametrize(("context", "end"), [("forkserver", "killed"), ("fork", "exits")])
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


class Stopping(Dataset[Any]):
    """A data set that has the run stopped at its nth reading of an item."""

    def __init__(self, data: Any, at: int) -> None:
        self.data, self.at, self.read, self.stop = data, at, 0, threading.Event()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        if self.read == self.at:
            self.stop.set()
        return self.data[index]


FINGERPRINT = 16  # readings before the run begins


def test_a_run_stops_after_the_update_that_is_under_way(digits: NamedData, tmp_path: Path) -> None:
    data = Stopping(digits.train, FINGERPRINT + 2 * 16 + 5)  # in the third batch of eight
    recipe = {"log_every": 100, "checkpoint_minutes": 100.0}
    with pytest.raises(Stopped, match="last is complete"):
        trained(network(), data, recipe=recipe, output_dir=tmp_path, stop=data.stop)
    assert progress_in(tmp_path)["updates"] == 3


def test_a_validation_ends_where_the_run_is_stopped_and_goes_on_to_the_same_result(
    digits: NamedData, tmp_path: Path
) -> None:
    recipe = {"log_every": 100, "checkpoint_minutes": 100.0, "batch_size": 16, "ema_decay": 0.9}
    whole = trained(network(), digits, recipe=recipe)
    val = Stopping(digits.val, FINGERPRINT + 50 + 20)  # in the second batch after the epoch
    with pytest.raises(Stopped):
        trained(network(), digits.train, val, recipe, output_dir=tmp_path, stop=val.stop)
    assert val.read <= FINGERPRINT + 50 + 32  # it did not go through the other half
    assert progress_in(tmp_path)["updates"] == 8
    again = trained(network(), digits, recipe=recipe, output_dir=tmp_path, resume=True)
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert again.history[1][name] == whole.history[1][name]


def test_the_library_installs_no_handlers_and_a_ctrl_c_is_raised_at_once(digits: NamedData, tmp_path: Path) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def press(facts: Facts) -> None:
        assert handlers() == before
        if facts.update == 5:
            signal.raise_signal(signal.SIGINT)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        trained(
            network(), digits.train, recipe={"checkpoint_minutes": 0.0}, output_dir=tmp_path,
            callbacks=Callbacks(after_update=press),
        )  # fmt: skip
    assert progress_in(tmp_path)["updates"] == 4  # of the last checkpoint


def test_a_second_ctrl_c_of_a_command_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    handler = signal.getsignal(signal.SIGINT)

    def press_twice() -> None:
        with signals.Signals() as told:
            signal.raise_signal(signal.SIGINT)
            assert told.stop.is_set()
            assert "Ctrl-C stops at once" in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(typer.Exit) as ended:
        press_twice()
    assert ended.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
