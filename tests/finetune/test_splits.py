"""A data set's parts are those that were meant, the same every time, and what is measured says which they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from command_line import said
from pictures import make_cifar10, make_folder
from tiny import trained
from torch import nn
from torchvision.datasets import ImageFolder

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import datasets, load_data, load_split


def told(folder: Path, data: Path | str, *options: str) -> list[str]:
    """The lines that come before the table, and of how many images the one after it is."""
    lines = said("evaluate", folder, "--data", data, "--cpu", "--workers", "0", *options).splitlines()
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("class"))]
    return [*before, next(line.partition(":")[0] for line in lines if ": accuracy" in line)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return add_se(timm.create_model("test_resnet", num_classes=2))


@pytest.fixture
def flowers(pictures: Path, tmp_path: Path) -> Path:
    """A folder of classes: 12 pictures of each."""
    return Path(shutil.copytree(pictures / "train", tmp_path / "flowers"))


def test_of_a_folder_with_splits_any_is_measured(result: Path, pictures: Path) -> None:
    val = pictures / "val"
    assert told(result, val) == [f"all of {val}: 10 images", "10 images"]  # of one of classes, all
    assert told(result, pictures) == [f"val of {pictures}: 10 images", "10 images"]
    (remark, *rest) = told(result, pictures, "--split", "train")
    assert "trained on these very images" in remark
    assert "--split val" in remark
    assert rest == [f"train of {pictures}: 24 images", "24 images"]
    for split in ("test", "all"):
        with pytest.raises(RetrofitError, match=f"no {split}: it has train and val"):
            told(result, pictures, "--split", split)


def test_a_folder_means_its_validation_or_else_its_test(result: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "val", tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / "blue")  # the classes are numbered by the network's, not by those that are there
    assert told(result, tmp_path) == [f"test of {tmp_path}: 5 images", "5 images"]
    with pytest.raises(RetrofitError, match="no val: it has test"):
        load_split(tmp_path, "val")
    shutil.copytree(pictures / "train", tmp_path / "train")
    assert load_split(tmp_path).name == "test"
    shutil.copytree(pictures / "val", tmp_path / "val")
    assert load_split(tmp_path).name == "val"
    for part in ("test", "val"):
        shutil.rmtree(tmp_path / part)
    with pytest.raises(RetrofitError, match="no val and no test: it has train"):
        load_split(tmp_path)
    assert len(load_split(tmp_path, "train").data) == 24


def test_a_folder_of_classes_alone_is_split_by_class_and_alike_every_time(
    flowers: Path, tmp_path: Path, model: nn.Module
) -> None:
    own, figures = tmp_path / "run", tmp_path / "figures.json"
    last = trained(model, load_data(flowers), recipe={"image_size": 32}, output_dir=own).history[-1]
    about, images = told(own, flowers, "--split", "val", "--output", str(figures))
    assert about.startswith(f"val of {flowers}: 4 of its 24 images")
    assert images == "4 images"
    assert json.loads(figures.read_text())["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    remark, whole, _ = told(own, flowers)
    assert "trained on 20 of these 24 images" in remark
    assert whole == f"all of {flowers}: 24 images"
    with pytest.raises(RetrofitError, match="no test"):
        load_split(flowers, "test")

    data, targets = load_data(flowers, val_fraction=0.25), ImageFolder(str(flowers)).targets
    assert sorted([*data.train.indices, *data.val.indices]) == list(range(24))
    assert [targets[index] for index in data.val.indices] == [0] * 3 + [1] * 3  # of each class as many
    assert "6 of its 24 images" in data.note
    for file in sorted((flowers / "red").iterdir())[1:]:
        file.unlink()
    with pytest.raises(RetrofitError, match=r"red has 1 image,"):
        load_data(flowers)


def test_a_class_may_have_the_name_of_a_split(flowers: Path, tmp_path: Path) -> None:
    for name in ("car", "train", "ship"):
        shutil.copytree(flowers / "red", tmp_path / "odd" / name)
    whole = load_split(tmp_path / "odd")
    assert (whole.name, len(whole.data), whole.data.classes) == ("all", 36, ["car", "ship", "train"])
    assert load_data(tmp_path / "odd").num_classes == 3


def test_digits_are_split_by_class_and_alike_every_time() -> None:
    a, b = load_data("digits", image_size=8), load_data("digits", image_size=8)
    assert a.train[0][0].shape == (3, 8, 8)
    train, val = ({image.numpy().tobytes() for image, _ in part} for part in (a.train, b.val))
    assert (len(train | val), len(train & val)) == (1797, 0)
    assert torch.bincount(a.val.tensors[1]).min() >= 34  # each class has its share
    assert -1 <= float(a.train.tensors[0].min()) < float(a.train.tensors[0].max()) <= 1
    assert len(load_split("digits", "train", image_size=8).data) == 1437
    with pytest.raises(RetrofitError, match="image_size must be at least 1, got 0"):
        load_data("digits", image_size=0)


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        ("digit", None, "'digit'"),
        ("", None, "no data ''"),
        ("odd", None, "it holds test"),
        ("high", None, "single class, high"),
        ("lacking", None, "lacks: green"),
        ("torch/cifar10", None, "'torch/cifar10'.*download=True"),
        ("torch/cifar10", "all", "no all: it has train and val and test"),
        ("digits", "test", "it has train and val"),
        ("digits", "tests", "no tests: it has train and val"),
    ],
)
def test_data_that_is_not_there_is_named(
    name: str, split: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd", "test").mkdir(parents=True)
    make_folder(Path("high", "high"), ("red",))
    make_folder(Path("lacking"), ("blue", "green", "red"))
    shutil.rmtree(Path("lacking", "train", "green"))
    with pytest.raises(RetrofitError, match=says):
        load_split(name, split, root="none") if split else load_data(name, root="none")


def test_a_library_that_is_missing_is_not_said_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'datasets'")

    monkeypatch.setattr(datasets, "create_dataset", fail)
    with pytest.raises(RetrofitError, match=r"No module named 'datasets'$"):
        load_data("hfds/a/b")


def test_a_data_set_of_torchvision_is_read_by_timms_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 as it lies on the disk, with generated images: nothing is downloaded."""
    make_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # other images, other sums
    data = load_data("torch/cifar10", root=tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (50, 10, 10)
    assert len(trained(data=data, recipe={"image_size": 16}).history) == 2


def test_hidden_and_empty_folders_are_no_classes_and_what_is_left_out_is_said(pictures: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(pictures / part, tmp_path / part)
    hidden = (".ipynb_checkpoints", "__MACOSX", "train/.thumbnails", "train/__MACOSX", "train/red/.ipynb_checkpoints")
    for name in (*hidden, "train/green", "train/yellow"):
        (tmp_path / name).mkdir()
    one = next((tmp_path / "train" / "red").iterdir())
    for name in (*(f"{folder}/a.png" for folder in hidden), "train/red/._a.png"):
        shutil.copy(one, tmp_path / name)
    for name in ("train/red/a.svg", "train/red/b.SVG", "train/green/c.svg", "val/blue/notes.txt"):
        (tmp_path / name).write_text("no image")
    data = load_data(tmp_path)
    assert (data.train.classes, data.num_classes, len(data.train), len(data.val)) == (["blue", "red"], 2, 24, 10)
    sizes, train, val = data.note.splitlines()
    assert sizes == "images: blue 12, red 12"
    missing = "files that are no images (3 .svg), folders without images (green, yellow)"
    assert train == f"left out of {tmp_path / 'train'}: {missing}"
    assert val == f"left out of {tmp_path / 'val'}: files that are no images (1 .txt)"
    assert load_split(tmp_path, "val").about == f"val of {tmp_path}: 10 images; {val}"
    assert len(load_data(tmp_path / "train").train) == 20  # a folder of classes


def test_classes_of_very_different_sizes_are_pointed_out(flowers: Path) -> None:
    assert "--balance" not in load_data(flowers).note
    for number in range(12 * 12):
        shutil.copy(flowers / "red" / "1.png", flowers / "blue" / f"more{number}.png")
    assert "--balance sampling" in load_data(flowers).note
