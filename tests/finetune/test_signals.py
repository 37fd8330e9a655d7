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
from tiny import config, network
from torch.utils.data import Dataset

from se_retrofit.cli import signals
from se_retrofit.finetune import Callbacks, Facts, NamedData, Stopped, finetune

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}


def progress_in(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "last" / "training.json").read_text())["progress"]
    return found


@pytest.mark.sweep
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_process_group_with_loading_workers_writes_a_checkpoint(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = ["--data", "digits", "--image-size", "16", "--epochs", "500", "--cpu", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "se_retrofit", "finetune", "timm/test_resnet", *arguments, "--workers", "2", "--set", "log_every=1"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    updates = tmp_path / "updates.jsonl"
    while process.poll() is None and not (updates.exists() and len(updates.read_text().splitlines()) >= 3):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    assert "stopping after this update" in said
    assert "Traceback" not in said
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
@pytest.mark.parametrize(("context", "end"), [("fork", "killed"), ("forkserver", "killed"), ("spawn", "exits")])
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
    data = Stopping(digits.train, FINGERPRINT + 2 * 32 + 5)  # in the third batch of eight
    recipe = config(log_every=100, checkpoint_minutes=100.0)
    with pytest.raises(Stopped, match="last is complete"):
        finetune(network(), data, config=recipe, output_dir=tmp_path, quiet=True, stop=data.stop)
    assert progress_in(tmp_path)["updates"] == 3


def test_a_validation_ends_where_the_run_is_stopped_and_goes_on_to_the_same_result(
    digits: NamedData, tmp_path: Path
) -> None:
    recipe = config(epochs=1, log_every=100, checkpoint_minutes=100.0, batch_size=25, ema_decay=0.9)
    whole = finetune(network(), digits.train, digits.val, config=recipe, quiet=True)
    val = Stopping(digits.val, FINGERPRINT + 100 + 30)  # in the second batch after the epoch
    with pytest.raises(Stopped):
        finetune(network(), digits.train, val, config=recipe, output_dir=tmp_path, quiet=True, stop=val.stop)
    assert val.read <= FINGERPRINT + 100 + 50  # it did not go through the other half
    assert progress_in(tmp_path)["updates"] == 10
    again = finetune(network(), digits.train, digits.val, config=recipe, output_dir=tmp_path, resume=True, quiet=True)
    assert again.updates == whole.updates
    assert again.best_accuracy == whole.best_accuracy
    assert again.history[1]["train_loss"] == whole.history[1]["train_loss"]
    assert again.history[1]["val_loss"] == whole.history[1]["val_loss"]


def test_the_library_installs_no_handlers(digits: NamedData) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, seen = handlers(), []
    callbacks = Callbacks(after_update=lambda facts: seen.append(handlers()))
    finetune(network(), digits.val, config=config(epochs=1), quiet=True, callbacks=callbacks)
    assert seen
    assert all(found == before for found in seen)


def test_a_ctrl_c_in_the_library_is_raised_at_once_and_the_last_checkpoint_is_kept(
    digits: NamedData, tmp_path: Path
) -> None:
    def press(facts: Facts) -> None:
        if facts.update == 5:
            signal.raise_signal(signal.SIGINT)

    recipe = config(epochs=1, checkpoint_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            network(),
            digits.train,
            config=recipe,
            output_dir=tmp_path,
            quiet=True,
            callbacks=Callbacks(after_update=press),
        )
    assert progress_in(tmp_path)["updates"] == 4


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
