from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import config, network, same
from torch import nn
from torch.utils.data import DataLoader

from se_retrofit import RetrofitError, load_retrofitted
from se_retrofit.finetune import FinetuneResult, NamedData, finetune
from se_retrofit.finetune.lock import LOCK, alone_in
from se_retrofit.saving.atomic import settled

HERE = Path(__file__).parent

# Everything that has state or is random, or changes what an update does
DEMANDING = {
    "epochs": 4, "batch_size": 16, "grad_accum_steps": 2, "mixup": 0.4, "cutmix": 0.4, "ema_decay": 0.95, "trainable": "se+head",
    "unfreeze_epoch": 2, "checkpoint_minutes": 0.0, "balance": "sampling", "layer_decay": 0.8, "se_lr_scale": 2.0,
    "head_lr_scale": 3.0, "clip_grad": 0.5, "label_smoothing": 0.1, "best_metric": "f1",
}  # fmt: skip
KILLS = 3


def updates_in(output: Path) -> list[dict[str, Any]]:
    path = output / "updates.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines_in(output: Path) -> int:
    path = output / "updates.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in history]


@pytest.mark.sweep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork server")
def test_runs_that_are_killed_three_times_end_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    from run_tiny import run_saying

    seed = random.randrange(2**32)
    print(f"the moments are those of random.Random({seed})")  # pytest shows it where the test fails
    chance, killed, runs = random.Random(seed), 0, 0
    context = multiprocessing.get_context("forkserver")
    # what a run imports late, too: it takes longer than the run
    context.set_forkserver_preload(["run_tiny", "matplotlib.figure", "sklearn.model_selection"])

    def begin(output: Path) -> Any:
        fields = {**DEMANDING, "workers": chance.choice([0, 1, 2])}  # which may change on resume
        process = context.Process(target=run_saying, args=(tmp_path / "said.txt", output, fields))
        process.start()
        return process

    def end(process: Any) -> None:
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "said.txt").read_text()

    whole = tmp_path / "whole"
    end(begin(whole))
    while killed < KILLS:
        broken = tmp_path / f"broken {runs}"
        run = begin(broken)
        wait_for_a_moment(broken, run, chance)
        run.kill()
        run.join(120)
        killed += run.exitcode == -signal.SIGKILL
        if killed == KILLS or finished(broken):
            end(begin(broken))
            check_same_runs(whole, broken)
            runs += 1


def wait_for_a_moment(output: Path, run: Any, chance: random.Random) -> None:
    """Somewhere in what comes before the first update, or after one more update, while others or checkpoints follow."""
    before, at_once, deadline = lines_in(output), chance.random() < 0.25, time.monotonic() + 120
    while not at_once and lines_in(output) <= before and run.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 1.5 if at_once else 0.3))


def finished(output: Path) -> bool:
    state = settled(output / "last") / "training.json"
    return state.exists() and bool(json.loads(state.read_text())["progress"]["finished"])


def check_same_runs(whole: Path, broken: Path) -> None:
    for folder in ("last", "best"):
        a, b = (load_file(output / folder / "weights.safetensors") for output in (whole, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), folder
    histories = [json.loads((o / "last" / "training.json").read_text())["progress"]["history"] for o in (whole, broken)]
    assert without_times(histories[0]) == without_times(histories[1])
    curves = [[(u["update"], u["loss"], u["lr"]) for u in updates_in(o)] for o in (whole, broken)]
    assert curves[0] == curves[1]
    assert [row["epoch"] for row in histories[1]] == list(range(DEMANDING["epochs"] + 1))


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """Have the run end after so many looks at the loss, as a kill would: nothing is tidied up on the disk."""
    from se_retrofit.finetune.log import Log

    update, seen = Log.update, []

    def counted(self: Log, *args: Any) -> None:
        update(self, *args)
        seen.append(1)
        if len(seen) == looks:
            raise Stopped

    monkeypatch.setattr(Log, "update", counted)


@pytest.mark.parametrize(
    ("optimizer", "loader"), [("adamw", False), ("lamb", False), pytest.param("sgd", True, marks=pytest.mark.sweep)]
)
def test_a_resumed_run_ends_with_the_same_weights(
    digits: NamedData, tmp_path: Path, optimizer: str, loader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the update that it had come to; with a loader of the caller's own, from its last whole epoch."""
    recipe = config(checkpoint_minutes=0.0, optimizer=optimizer, trainable="se+head", unfreeze_epoch=2)

    def data() -> Any:
        return DataLoader(digits.train, 32, shuffle=True) if loader else digits.train

    whole = finetune(network(), data(), digits.val, config=recipe, output_dir=tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        with pytest.raises(Stopped):
            finetune(network(), data(), digits.val, config=recipe, output_dir=tmp_path / "broken", quiet=True)
    progress = json.loads((tmp_path / "broken" / "last" / "training.json").read_text())["progress"]
    assert progress["updates"] == (8 if loader else 10)
    again = finetune(
        network(), data(), digits.val, config=recipe, output_dir=tmp_path / "broken", resume=True, quiet=True
    )
    assert again.updates == whole.updates
    for folder in ("best", "last"):
        a, b = (load_file(tmp_path / run / folder / "weights.safetensors") for run in ("whole", "broken"))
        assert all(torch.equal(a[key], b[key]) for key in a), folder


# A finished run, and what became of it

RECIPE = {
    "epochs": 1,
    "ema_decay": 0.9,
    "schedule": "constant",
    "warmup_ratio": 0.0,
}  # the length changes no learning rate


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, digits: NamedData) -> Path:
    output = tmp_path_factory.mktemp("original")
    finetune(network(), digits.train, digits.val, config=config(**RECIPE), output_dir=output, quiet=True)
    return output


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def resumed(run: Path, data: NamedData, model: nn.Module | None = None, **changes: Any) -> FinetuneResult:
    recipe = config(**{**RECIPE, **changes})
    return finetune(model or network(), data.train, data.val, config=recipe, output_dir=run, resume=True, quiet=True)


def test_a_run_that_is_over_is_not_run_again_but_may_be_extended(run: Path, digits: NamedData) -> None:
    again = resumed(run, digits)
    assert again.updates == 8
    weights = load_file(run / "best" / "weights.safetensors")
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in weights.items())
    with pytest.raises(RetrofitError, match=r"holds a run already; go on with it \(resume=True\)"):
        finetune(network(), digits.train, config=config(**RECIPE), output_dir=run, quiet=True)
    extended = resumed(run, digits, epochs=3)
    whole = finetune(network(), digits.train, digits.val, config=config(**{**RECIPE, "epochs": 3}), quiet=True)
    assert without_times(extended.history) == without_times(whole.history)
    assert same(extended.model.state_dict(), whole.model.state_dict())
    with pytest.raises(RetrofitError, match="epochs: 3 then, 2 now"):
        resumed(run, digits, epochs=2)


def test_a_run_is_not_resumed_with_another_recipe(run: Path, digits: NamedData) -> None:
    with pytest.raises(RetrofitError, match=r"another config \(lr: 0.001 then, 0.1 now; seed: 0 then, 3 now\)"):
        resumed(run, digits, lr=0.1, seed=3)
    state = run / "last" / "training.json"
    content = json.loads(state.read_text())
    del content["config"]["label_smoothing"]  # as if it had come in a later version
    state.write_text(json.dumps(content))
    with pytest.raises(RetrofitError, match=r"label_smoothing: 0\.1 then, 0\.3 now"):
        resumed(run, digits, label_smoothing=0.3)
    assert resumed(run, digits).updates == 8


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("cut", "cut short"), ("json", "cut short"), ("field", "unknown: mood"), ("newer", "newer than"),
        ("history", "history is of type int"), ("lost", r"no file .*training\.json"), ("tensor", r"no\.such"),
        ("optimizer", "may have been edited"), ("ema", "may have been edited"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_a_clear_error(run: Path, digits: NamedData, damage: str, says: str) -> None:
    state, tensors = run / "last" / "training.json", run / "last" / "training.safetensors"
    content = json.loads(state.read_text())
    if damage in ("optimizer", "ema"):
        content["parts"][damage] = {"dict": []}
    content.update({"field": {"mood": "good"}, "newer": {"format": 4, "mood": "good"}}.get(damage, {}))
    if damage == "history":
        content["progress"]["history"] = 3
    elif damage == "tensor":
        content["parts"]["optimizer"] = {"tensor": "no.such"}
    state.write_text(json.dumps(content)[: -100 if damage == "json" else None])
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "lost":
        state.unlink()  # and no run begins over the rest of it
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RetrofitError, match=says):
        resumed(run, digits, model)
    assert says == "may have been edited" or same(before, model.state_dict())


def test_files_that_only_tell_of_a_run_may_be_broken_or_lost(run: Path, digits: NamedData) -> None:
    (run / "updates.jsonl").write_bytes(b'\xff{\n[1]\n"x"\n')
    (run / "run.yaml").write_text("a: [1")
    (run / "metrics.jsonl").unlink()
    resumed(run, digits, epochs=2)
    assert [update["epoch"] for update in updates_in(run)] == [2] * 8
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((run / "run.yaml").read_text())["config"]["epochs"] == 2


def test_what_split_takes_apart_join_puts_together() -> None:
    from se_retrofit.finetune.checkpoint import join, split

    tree = {"a": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.95)}, 7: []}, "b": [1, None, "x", True, float("inf")]}
    plain, tensors = split(tree)
    again = join(json.loads(json.dumps(plain)), tensors)
    assert again["a"][0]["betas"] == (0.9, 0.95)
    assert torch.equal(again["a"][0]["step"], torch.tensor(3.0))
    assert again["a"][7] == []
    assert again["b"] == tree["b"]


# The disk


@pytest.mark.sweep
def test_a_full_disk_keeps_the_last_good_checkpoint(digits: NamedData, tmp_path: Path) -> None:
    """The limit on the size of a file stands for the end of the disk: the write itself fails, in the middle of it."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
from tiny import *
from se_retrofit.finetune import finetune
from se_retrofit.finetune.checkpoint import Folder
data = tiny_data()
save, saves = Folder.save, []
def limited(*args, **kwargs):
    if saves:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    saves.append(1)
    save(*args, **kwargs)
Folder.save = limited
finetune(network(), data.train, data.val, config=config(trainable="se"), output_dir={str(tmp_path)!r}, quiet=True)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE.parents[1], check=False
    )
    assert run.returncode == 1
    assert "RetrofitError" in run.stderr.splitlines()[-1], run.stderr
    assert "can't be written" in run.stderr.splitlines()[-1]
    assert "File too large" in run.stderr.splitlines()[-1]
    assert "untouched" in run.stderr.splitlines()[-1]
    progress = json.loads((tmp_path / "last" / "training.json").read_text())["progress"]
    assert progress["epoch"] == 1
    load_retrofitted(tmp_path / "last", base=network(se=False))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    again = finetune(
        network(), digits.train, digits.val, config=config(trainable="se"), output_dir=tmp_path, resume=True, quiet=True
    )
    assert again.stopped == "epochs"


def test_too_little_room_is_found_before_training(
    digits: NamedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RetrofitError, match=r"MiB left, and the checkpoints of this run need about"):
        finetune(network(), digits.train, config=config(), output_dir=tmp_path, quiet=True)


def test_an_output_folder_that_cannot_be_made_is_named(digits: NamedData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrofitError, match=r"file/run can't be made: Not a directory"):
        finetune(network(), digits.train, config=config(), output_dir=tmp_path / "file" / "run", quiet=True)


# a run, as far as others see it; without the package, whose import takes seconds
HOLDS = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no locks of this kind")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(
    digits: NamedData, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(RetrofitError, match=f"another process is running in {tmp_path}; wait"):
            finetune(network(), digits.train, config=config(epochs=1), output_dir=tmp_path, quiet=True)
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
        other.kill()
    # its file is still there, as after every kill, and holds nobody up
    finetune(network(), digits.train, config=config(epochs=1), output_dir=tmp_path, quiet=True)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no locks of this kind")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()  # as root, who may write everywhere
    with pytest.raises(RetrofitError, match="can't be written: Is a directory"), alone_in(tmp_path):
        pass
