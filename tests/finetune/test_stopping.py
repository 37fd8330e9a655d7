"""Runs that are told about, stopped and broken off; the library installs no handlers, and the command line exits as a shell expects."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from sweeps import swept
from tiny import ENVIRONMENT, Items, config, digits, network, progress_in, same, torchrun, trained

from se_retrofit.cli import signals
from se_retrofit.finetune import Callbacks, Facts, Stopped, evaluate
from se_retrofit.locks import LOCK

# Callbacks


def test_each_event_is_told_with_its_facts(tmp_path: Path) -> None:
    told: list[tuple[str, Facts]] = []

    def teller(event: str) -> Callable[[Facts], None]:
        return lambda facts: told.append((event, facts))

    callbacks = Callbacks(*(teller(event) for event in ("update", "evaluation", "epoch", "training")))
    model = network()
    recipe = {"epochs": 2, "log_every": 3, "ema_decay": 0.9}
    result = trained(model, recipe=recipe, output_dir=tmp_path, callbacks=callbacks)
    epochs = [[*[("update", epoch)] * 8, ("evaluation", epoch), ("epoch", epoch)] for epoch in (1, 2)]
    assert [(event, facts.epoch) for event, facts in told] == [
        ("evaluation", 0),
        *epochs[0],
        *epochs[1],
        ("training", 2),
    ]
    steps = [facts for event, facts in told if event == "update"]
    assert [facts.update for facts in steps] == list(range(1, 17))
    losses = torch.stack([facts.loss for facts in steps])
    assert losses[8:].mean().item() == pytest.approx(result.history[2]["train_loss"])
    assert all(facts.model is model and facts.tested is not model for facts in steps)
    assert [dict(row) for row in told[-1][1].history] == result.history
    with pytest.raises(TypeError):
        told[-1][1].history[-1]["val_loss"] = 0.0  # type: ignore[index]
    with pytest.raises(TypeError, match=r"after_epoch .*got 3"):
        Callbacks(after_epoch=3)  # type: ignore[arg-type]


def test_a_run_with_callbacks_that_evaluate_and_draw_gives_the_same_weights() -> None:
    def look(facts: Facts) -> None:
        torch.rand(3)
        if facts.loss is None:
            evaluate(facts.model, few.val, config=config())

    few = digits(32, 16)
    told, untold = network(drop_rate=0.2), network(drop_rate=0.2)
    trained(told, few, recipe={"mixup": 0.4}, callbacks=Callbacks(look, look, look, look))
    trained(untold, few, recipe={"mixup": 0.4})
    assert same(told.state_dict(), untold.state_dict())


@pytest.mark.parametrize("event", swept(["after_epoch"], ["after_update", "after_evaluation", "after_training"]))
def test_what_a_callback_raises_ends_the_run_and_it_goes_on_without_the_callback(tmp_path: Path, event: str) -> None:
    def fail(facts: Facts) -> None:
        assert (tmp_path / LOCK).exists()
        raise ZeroDivisionError(event)

    few, recipe = digits(32, 16), {"trainable": "se"}
    state = torch.get_rng_state()
    model, again, whole = network().eval(), network(), network()
    with pytest.raises(ZeroDivisionError, match=event):
        trained(model, few, recipe=recipe, output_dir=tmp_path, callbacks=Callbacks(**{event: fail}))
    assert not (tmp_path / LOCK).exists()
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    trained(again, few, recipe=recipe, output_dir=tmp_path, resume=True)
    trained(whole, few, recipe=recipe)
    assert same(again.state_dict(), whole.state_dict())


# Stops


def stopping(data: Any, at: int) -> tuple[Items, threading.Event, itertools.count[int]]:
    """The data, which has the run stopped at this reading of an item once it has begun; the stop, and the next reading."""
    readings, stop = itertools.count(-15), threading.Event()  # 16 readings before the run begins

    def item(index: int) -> Any:
        if next(readings) == at:
            stop.set()
        return data[index]

    return Items(len(data), item), stop, readings


def test_a_run_stops_after_the_update_that_is_under_way(tmp_path: Path) -> None:
    data, stop, _ = stopping(digits().train, 2 * 16 + 5)  # in the third batch of eight
    recipe = {"log_every": 100, "checkpoint_minutes": 100.0}
    with pytest.raises(Stopped, match="last is complete"):
        trained(data=data, recipe=recipe, output_dir=tmp_path, stop=stop)
    assert progress_in(tmp_path)["updates"] == 3


def test_a_validation_ends_where_the_run_is_stopped_and_goes_on_to_the_same_result(tmp_path: Path) -> None:
    recipe = {"log_every": 100, "checkpoint_minutes": 100.0, "ema_decay": 0.9}
    whole = trained(recipe=recipe)
    val, stop, readings = stopping(digits().val, 50 + 20)  # in the second batch after the epoch
    with pytest.raises(Stopped):
        trained(None, digits().train, val, recipe, output_dir=tmp_path, stop=stop)
    assert next(readings) <= 50 + 32 + 1  # it did not go through the other half
    assert progress_in(tmp_path)["updates"] == 8
    again = trained(recipe=recipe, output_dir=tmp_path, resume=True)
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert again.history[1][name] == whole.history[1][name]


# Signals


def test_the_library_installs_no_handlers_and_a_ctrl_c_is_raised_at_once(tmp_path: Path) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def press(facts: Facts) -> None:
        assert handlers() == before
        if facts.update == 5:
            signal.raise_signal(signal.SIGINT)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        trained(recipe={"checkpoint_minutes": 0.0}, output_dir=tmp_path, callbacks=Callbacks(after_update=press))
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


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGTERM, None)],
    ids=["SIGTERM", "SIGINT", "torchrun"],
)
def test_a_signal_to_a_command_writes_a_checkpoint(number: int, code: int | None, tmp_path: Path) -> None:
    """To the process group, with loading processes; or to torchrun alone, as a cluster's scheduler ends a job."""
    launcher, workers = (torchrun(), "0") if code is None else ([sys.executable], "1")
    recipe = [
        "--data",
        "digits",
        "--image-size",
        "16",
        "--epochs",
        "500",
        "--cpu",
        "--log-every",
        "1",
        "--workers",
        workers,
    ]
    process = subprocess.Popen(
        [*launcher, "-m", "se_retrofit", "finetune", "timm/test_resnet", *recipe, "--output", str(tmp_path / "run")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    updates = tmp_path / "run" / "updates.jsonl"
    while process.poll() is None and not (updates.exists() and updates.read_text().count("\n") >= 3):
        time.sleep(0.01)
    (os.kill if code is None else os.killpg)(process.pid, number)
    said = process.communicate(timeout=120)[0]
    if code is None:
        assert said.count("stopped; ") == 1, said
    else:
        assert process.returncode == code, said
        assert "stopping after this update" in said
        assert "Traceback" not in said
    assert progress_in(tmp_path / "run")["updates"] >= 3


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
@pytest.mark.parametrize(("context", "end", "code"), [("forkserver", "killed", -signal.SIGKILL), ("fork", "exits", 0)])
def test_loading_processes_end_with_the_main_process(tmp_path: Path, context: str, end: str, code: int) -> None:
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    with subprocess.Popen(
        [sys.executable, str(script), context, end], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            process.communicate(timeout=120)  # the pipe is closed when the last process has ended
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == code
