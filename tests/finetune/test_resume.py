"""A run that was broken off anywhere goes on to the same weights, a folder is never half-written, and no run goes on as another."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from pictures import make_folder
from PIL import Image
from safetensors.torch import load_file
from tiny import Finished, Items, breaking, digits, network, progress_in, rows_in, same, state_of, trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

from se_retrofit import RetrofitError, add_se, load_retrofitted
from se_retrofit.finetune import FinetuneResult, NamedData
from se_retrofit.finetune.checkpoint import Folder
from se_retrofit.finetune.experiment import describe_data, describe_run
from se_retrofit.locks import LOCK, alone_in

# Everything that has state or is random, or changes what an update does
DEMANDING = {
    "epochs": 4, "batch_size": 16, "grad_accum_steps": 2, "mixup": 0.4, "cutmix": 0.4, "ema_decay": 0.95, "trainable": "se+head",
    "unfreeze_epoch": 2, "checkpoint_minutes": 0.0, "balance": "sampling", "layer_decay": 0.8, "se_lr_scale": 2.0,
    "head_lr_scale": 3.0, "clip_grad": 0.5, "label_smoothing": 0.1, "best_metric": "f1",
}  # fmt: skip


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in history]


def check_same_runs(whole: Path, broken: Path) -> None:
    for folder in ("last", "best"):
        assert same(*(load_file(output / folder / "weights.safetensors") for output in (whole, broken))), folder
    histories = [without_times(progress_in(output)["history"]) for output in (whole, broken)]
    assert histories[0] == histories[1]
    curves = [[(u["update"], u["loss"], u["lr"]) for u in rows_in(o / "updates.jsonl")] for o in (whole, broken)]
    assert curves[0] == curves[1]


@pytest.mark.sweep
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork server")
def test_a_run_that_is_killed_three_times_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"the moments are those of random.Random({seed})")  # pytest shows it where the test fails
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    # what a run imports late, too: it takes longer than the run
    context.set_forkserver_preload(["tiny", "sklearn.model_selection"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def begin(output: Path, **changes: Any) -> Any:
        fields = {**DEMANDING, "workers": chance.choice([0, 1]), **changes}  # which may change on resume
        process = context.Process(target=tiny.run_saying, args=(tmp_path / "said.txt", output, fields))
        process.start()
        return process

    for kill in range(3):
        run = begin(broken)
        wait_for_a_moment(broken / "updates.jsonl", run, chance, before_it_begins=kill == 0)
        run.kill()
        run.join(120)
    for output in (broken, whole):
        run = begin(output, workers=0)
        run.join(120)
        assert run.exitcode == 0, (tmp_path / "said.txt").read_text()
    check_same_runs(whole, broken)


def wait_for_a_moment(updates: Path, run: Any, chance: random.Random, before_it_begins: bool) -> None:
    """Somewhere in what comes before the first update, or after one more update, while others or checkpoints follow."""

    def count() -> int:
        return len(updates.read_text().splitlines()) if updates.exists() else 0  # the last may be half-written

    before, deadline = count(), time.monotonic() + 120
    while not before_it_begins and count() <= before and run.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 1.0 if before_it_begins else 0.15))


SWEPT = [pytest.param(*case, marks=pytest.mark.sweep) for case in (("lamb", False), ("sgd", True))]


@pytest.mark.parametrize(("optimizer", "loader"), [("adamw", False), *SWEPT])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, optimizer: str, loader: bool) -> None:
    """From the update that it had come to; with a loader of the caller's own, from its last whole epoch."""
    recipe = {
        "epochs": 2,
        "checkpoint_minutes": 0.0,
        "trainable": "se+head",
        "unfreeze_epoch": 2,
        "optimizer": optimizer,
    }

    def run(folder: str, **options: Any) -> FinetuneResult:
        train = DataLoader(digits().train, 16, shuffle=True) if loader else digits().train
        return trained(network(), train, digits().val, recipe, output_dir=tmp_path / folder, **options)

    whole = run("whole")
    with pytest.raises(ZeroDivisionError):
        run("broken", callbacks=breaking(11))
    assert progress_in(tmp_path / "broken")["updates"] == (8 if loader else 10)
    assert run("broken", resume=True).updates == whole.updates
    check_same_runs(tmp_path / "whole", tmp_path / "broken")


# A finished run, and what became of it


@pytest.fixture
def run(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def resumed(run: Path, model: nn.Module | None = None, data: Any = None, **changes: Any) -> FinetuneResult:
    return trained(model, data, recipe={**tiny.RECIPE, **changes}, output_dir=run, resume=True)


def test_a_run_that_is_over_is_not_run_again_but_may_be_extended(run: Path) -> None:
    again = resumed(run)
    assert again.updates == 8
    assert same(load_file(run / "best" / "weights.safetensors"), again.model.state_dict())
    with pytest.raises(RetrofitError, match="resume=True"):
        trained(recipe=tiny.RECIPE, output_dir=run)
    extended = resumed(run, epochs=3)
    whole = trained(recipe={**tiny.RECIPE, "epochs": 3})
    assert without_times(extended.history) == without_times(whole.history)
    assert same(extended.model.state_dict(), whole.model.state_dict())
    with pytest.raises(RetrofitError, match="epochs: 3 then, 2 now"):
        resumed(run, epochs=2)


def test_a_run_is_not_resumed_with_another_recipe(run: Path) -> None:
    with pytest.raises(RetrofitError, match=r"lr: 0.001 then, 0.1 now; seed: 0 then, 3 now"):
        resumed(run, lr=0.1, seed=3)
    state = run / "last" / "training.json"
    content = json.loads(state.read_text())
    del content["config"]["label_smoothing"]  # as if it had come in a later version
    state.write_text(json.dumps(content))
    with pytest.raises(RetrofitError, match=r"label_smoothing: 0\.1 then, 0\.3 now"):
        resumed(run, label_smoothing=0.3)
    assert resumed(run).updates == 8


def other_images() -> NamedData:
    images, classes = (torch.stack(list(column)) for column in zip(*digits().train, strict=True))
    return NamedData(TensorDataset(-images, classes), digits().val, 10)


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (lambda: network(seed=1), digits, r"starting weights: '\w+' then, '\w+' now.*torch\.manual_seed"),
        (lambda: add_se(network(se=False), placement="post"), digits, "SE options, placement: 'auto' then, 'post' now"),
        (lambda: add_se(network(se=False), reduction=4), digits, "SE options, reduction: 8 then, 4 now"),
        (lambda: network(se=False), digits, r"SE options: .* then, None now"),
        (network, lambda: digits(100), "training data, length: 128 then, 100 now"),
        (network, other_images, r"training data, samples: '\w+' then, '\w+' now"),
        (network, lambda: digits(val=40), "validation data, length: 50 then, 40 now"),
        (network, lambda: digits().train, "validation data: .* then, None now"),
    ],
    ids=["weights", "placement", "reduction", "plain", "fewer images", "other images", "other val", "no val"],
)
def test_a_run_is_not_resumed_as_another_experiment(finished: Finished, model: Any, data: Any, says: str) -> None:
    given, file = model(), finished.folder / "last" / "training.json"
    before, written = state_of(given), file.read_bytes()
    with pytest.raises(RetrofitError, match=says):
        resumed(finished.folder, given, data())
    assert same(before, given.state_dict())
    assert file.read_bytes() == written


def test_what_a_run_was_is_written_beside_it(finished: Finished) -> None:
    written = yaml.safe_load((finished.folder / "run.yaml").read_text())
    assert written["config"] == finished.config.to_dict()
    described = describe_run(network(), digits().train, digits().val)
    assert {name: written["experiment"][name] for name in described} == described
    assert written["experiment"]["processes"] == 1


def test_a_data_set_is_the_same_after_it_was_moved_and_another_after_an_image_was_changed(tmp_path: Path) -> None:
    here = describe_data(ImageFolder(str(make_folder(tmp_path / "a") / "train")))
    moved = make_folder(tmp_path / "b") / "train"
    assert describe_data(ImageFolder(str(moved))) == here
    Image.new("RGB", (50, 40)).save(moved / "blue" / "0.jpg")
    changed = describe_data(ImageFolder(str(moved)))
    assert changed["names"] == here["names"]
    assert changed["samples"] != here["samples"]
    (moved / "blue" / "1.png").rename(moved / "blue" / "one.png")
    assert describe_data(ImageFolder(str(moved)))["names"] != here["names"]


def test_random_augmentation_in_a_data_set_does_not_make_it_another() -> None:
    generator = torch.Generator()  # of the data set's own: no seed reaches it
    data = Items(20, lambda index: (torch.randn(3, 4, 4, generator=generator), index))
    assert describe_data(data) == describe_data(data)
    assert describe_data(DataLoader(data, 5)) == {**describe_data(data), "batch size": 5}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("cut", "cut short"), ("json", "cut short"), ("field", "unknown: mood"), ("newer", "newer than"),
        ("history", "history is of type int"), ("lost", r"no file .*training\.json"), ("tensor", r"no\.such"),
        ("optimizer", "may have been edited"), ("ema", "may have been edited"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_a_clear_error(run: Path, damage: str, says: str) -> None:
    state, tensors = run / "last" / "training.json", run / "last" / "training.safetensors"
    content = json.loads(state.read_text())
    if damage in ("optimizer", "ema"):
        content["parts"][damage] = {"dict": []}
    content.update({"field": {"mood": "good"}, "newer": {"format": 5, "mood": "good"}}.get(damage, {}))
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
    before = state_of(model)
    with pytest.raises(RetrofitError, match=says):
        resumed(run, model)
    assert says == "may have been edited" or same(before, model.state_dict())


def test_files_that_only_tell_of_a_run_may_be_broken_or_lost(run: Path) -> None:
    (run / "updates.jsonl").write_bytes(b'\xff{\n[1]\n"x"\n')
    (run / "run.yaml").write_text("a: [1")
    (run / "metrics.jsonl").unlink()
    resumed(run, epochs=2)
    assert [update["epoch"] for update in rows_in(run / "updates.jsonl")] == [2] * 8
    assert len(rows_in(run / "metrics.jsonl")) == 3
    assert yaml.safe_load((run / "run.yaml").read_text())["config"]["epochs"] == 2


def test_a_result_whose_checkpoint_was_deleted_is_not_replaced(run: Path) -> None:
    weights, metrics = run / "best" / "weights.safetensors", run / "metrics.jsonl"
    shutil.rmtree(run / "last")
    before = weights.read_bytes()
    for resume in (False, True):
        with pytest.raises(RetrofitError, match="no last/ to go on from"):
            trained(output_dir=run, resume=resume)
    assert weights.read_bytes() == before
    metrics.write_text(metrics.read_text().splitlines()[0])  # killed between the first epoch's best/ and last/
    trained(recipe={"max_updates": 1}, output_dir=run, resume=True)
    assert weights.read_bytes() != before


# The disk


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits of this kind")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on the size of a file stands for the end of the disk: the write itself fails, in the middle of it."""
    save, saves = Folder.save, []
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe = {"epochs": 2, "trainable": "se"}

    def limited(*args: Any) -> None:
        if saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        saves.append(1)
        save(*args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "save", limited)
            with pytest.raises(RetrofitError, match=r"last can't be written: .*File too large.*untouched"):
                trained(recipe=recipe, output_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert progress_in(tmp_path)["epoch"] == 1
    load_retrofitted(tmp_path / "last", base=network(se=False))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert trained(recipe=recipe, output_dir=tmp_path, resume=True).stopped == "epochs"


def test_an_output_folder_that_cannot_be_made_or_holds_foreign_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrofitError, match=r"file/run can't be made"):
        trained(output_dir=tmp_path / "file" / "run")
    for folder in ("last", "best"):
        place = tmp_path / f"beside {folder}"
        (place / folder).mkdir(parents=True)
        (place / folder / "thesis.tex").write_text("")
        with pytest.raises(RetrofitError, match=rf"{folder} .*\(thesis.tex\)"):
            trained(output_dir=place)
        assert sorted(path.name for path in place.rglob("*")) == sorted([folder, "thesis.tex"])


# a run, as far as others see it; without the package, whose import takes seconds
HOLDS = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no locks of this kind")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(RetrofitError, match=f"another process .*{tmp_path}"):
            trained(output_dir=tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
        other.kill()
    # its file is still there, as after every kill, and holds nobody up
    with alone_in(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).mkdir()  # as root, who may write everywhere
    with pytest.raises(RetrofitError, match=f"{tmp_path} can't be written"), alone_in(tmp_path):
        pass
