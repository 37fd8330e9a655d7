"""Two processes train as one does, resume and stop together.

Run by torchrun with a folder, this file is also what they train: FOLDER/one holds a run of a single process. Each process
writes into FOLDER/told.RANK.json what was raised.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ENVIRONMENT, Items, breaking, digits, network, progress_in, rows_in, same, torchrun, trained
from torch import nn

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneResult, NamedData, Stopped
from se_retrofit.finetune.checkpoint import Folder
from se_retrofit.finetune.log import Log

pytestmark = pytest.mark.sweep

# With frozen statistics and nothing random in the network two processes compute what one does, to rounding
RECIPE = {
    "epochs": 2, "freeze_bn": True, "optimizer": "sgd", "lr": 0.005,
    "clip_grad": None,  # clipping would hide a wrong factor
    "grad_accum_steps": 2, "patience": 2,
}  # fmt: skip
# All that has state, is random or differs between processes
DEMANDING = {
    "epochs": 2, "batch_size": 8, "grad_accum_steps": 2, "mixup": 0.4, "ema_decay": 0.9, "checkpoint_minutes": 0.0, "trainable": "se+head",
    "unfreeze_epoch": 2,
}  # fmt: skip


def train(
    folder: Path, fields: dict[str, Any], model: nn.Module | None = None, data: NamedData | None = None, **options: Any
) -> FinetuneResult:
    return trained(model, data or digits(128), recipe=fields, output_dir=folder, **options)


def failing(*args: Any) -> None:
    raise RetrofitError("last can't be written: No space left on device")


def main(root: Path) -> None:
    torch.set_num_threads(1)
    Log.pictures = lambda *_: None  # type: ignore[method-assign]
    told: dict[str, Any] = {}
    rank = os.environ["RANK"]

    def refused(name: str, *args: Any, **options: Any) -> None:
        try:
            train(*args, **options)
            told[name] = ""
        except (Stopped, ZeroDivisionError, ValueError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    train(root / "two", {**RECIPE, "batch_size": 8}, quiet=False)
    few = {"data": digits(64)}
    train(root / "whole", DEMANDING, **few)
    refused("broken", root / "broken", DEMANDING, **few, callbacks=breaking(3))
    train(root / "broken", DEMANDING, **few, resume=True)
    refused("other number", root / "one", {**RECIPE, "batch_size": 16}, resume=True)
    for name, changes in (("told of unused", {"find_unused_parameters": True}), ("unused", {})):
        model = network()
        model.unused = nn.Linear(2, 2)
        refused(name, root / name, {"batch_size": 8, **changes}, model, **few)
    save, Folder.save = Folder.save, failing  # type: ignore[method-assign]
    refused("full disk", root / "full disk", {"batch_size": 8}, **few)
    Folder.save = save  # type: ignore[method-assign]
    stop, readings = threading.Event(), itertools.count()

    def item(index: int) -> Any:
        if next(readings) == 12 and rank == "1":  # the other process knows it from this one
            stop.set()
        return digits().val[index]

    evaluated = NamedData(digits(4).train, Items(50, item), 10)
    refused("stopped", root / "stopped", {"batch_size": 1, "freeze_bn": True}, data=evaluated, stop=stop)
    told["read"] = next(readings)
    # last, because the process that is refused leaves the other one alone
    refused("apart", root / ("whole" if rank == "0" else "elsewhere"), DEMANDING, **few, resume=True)
    (root / f"told.{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that is trained, and of one process's run beside it."""
    root = tmp_path_factory.mktemp("processes")
    train(root / "one", {**RECIPE, "batch_size": 16})
    command = [*torchrun(), __file__, str(root)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (root / "said.txt").write_text(done.stdout)
    return root


def told(root: Path, name: str) -> list[Any]:
    return [json.loads((root / f"told.{rank}.json").read_text())[name] for rank in (0, 1)]


def test_two_processes_follow_the_loss_curve_of_one_with_the_doubled_batch(root: Path) -> None:
    curve, curve2 = ([row["loss"] for row in rows_in(root / name / "updates.jsonl")] for name in ("one", "two"))
    assert len(curve) == 8
    assert curve2 == pytest.approx(curve, rel=1e-4)
    assert curve[-1] < curve[0]
    for row, row2 in zip(*(rows_in(root / name / "metrics.jsonl") for name in ("one", "two")), strict=True):
        assert row2["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)
        assert row2["val_accuracy"] == row["val_accuracy"]
    weights, weights2 = (load_file(root / name / "best" / "weights.safetensors") for name in ("one", "two"))
    for key, value in weights.items():
        torch.testing.assert_close(weights2[key], value, rtol=1e-3, atol=1e-5)
    assert (root / "said.txt").read_text().count("best validation accuracy") == 1  # one process prints


def test_two_processes_resume_to_the_same_weights_and_not_as_another_number(root: Path) -> None:
    assert told(root, "broken") == ["ZeroDivisionError: "] * 2
    for folder in ("last", "best"):
        assert same(*(load_file(root / run / folder / "weights.safetensors") for run in ("whole", "broken"))), folder
    assert all("processes: 1 then, 2 now" in said for said in told(root, "other number"))


def test_an_error_of_the_process_that_writes_is_raised_in_all(root: Path) -> None:
    assert told(root, "full disk") == ["RetrofitError: last can't be written: No space left on device"] * 2


def test_unused_parameters_are_trained_around_where_it_is_told_so(root: Path) -> None:
    assert told(root, "told of unused") == ["", ""]
    assert all("find_unused_parameters" in said for said in told(root, "unused"))


def test_an_evaluation_ends_in_all_processes_where_one_of_them_is_stopped(root: Path) -> None:
    assert all(said.startswith("Stopped: ") for said in told(root, "stopped"))
    assert all(read < 25 for read in told(root, "read"))  # of as many images each
    assert progress_in(root / "stopped")["history"] == []


def test_a_process_that_does_not_see_the_checkpoint_of_the_others_is_an_error(root: Path) -> None:
    assert "elsewhere/last/training.json" in told(root, "apart")[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
