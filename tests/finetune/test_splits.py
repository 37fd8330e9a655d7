"""An evaluation measures the images that were meant, and says which they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from command_line import said
from tiny import config, trained
from torch import nn
from torchvision.datasets import ImageFolder

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import evaluate, load_data, load_split

CONFIG = config(image_size=32, batch_size=8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return add_se(timm.create_model("test_resnet", num_classes=2))


def make_run(folder: Path, output: Path, model: nn.Module) -> Path:
    """A short run on a folder of pictures."""
    trained(model, load_data(folder), recipe={"image_size": 32, "batch_size": 8}, output_dir=output)
    return output


def told(folder: Path, data: Path | str, *options: str) -> list[str]:
    """The lines that come before the table, and of how many images the one after it is."""
    lines = said("evaluate", folder, "--data", data, "--cpu", "--workers", "0", *options).splitlines()
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("class"))]
    return [*before, next(line.partition(":")[0] for line in lines if ": accuracy" in line)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path, model: nn.Module) -> Path:
    """On pictures/train and pictures/val."""
    return make_run(pictures, tmp_path_factory.mktemp("run"), model)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A folder of classes: 12 pictures of each."""
    return Path(shutil.copytree(pictures / "train", tmp_path_factory.mktemp("data") / "flowers"))


def test_of_a_folder_with_splits_any_is_measured(run: Path, pictures: Path) -> None:
    assert told(run, pictures / "val") == [
        f"all of {pictures / 'val'}: 10 images",
        "10 images",
    ]  # of one of classes, all
    assert told(run, pictures) == [f"val of {pictures}: 10 images", "10 images"]
    (remark, *rest) = told(run, pictures, "--split", "train")
    assert "trained on these very images" in remark
    assert "--split val" in remark
    assert rest == [f"train of {pictures}: 24 images", "24 images"]
    (remark, *rest) = told(run, pictures, "--split", "all")
    assert "trained on 24 of these 34 images" in remark
    assert rest == [f"all of {pictures}: 34 images, of train and val", "34 images"]
    with pytest.raises(RetrofitError, match="no test: it has train and val"):
        told(run, pictures, "--split", "test")


def test_a_folder_means_its_validation_or_else_its_test(run: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "val", tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / "blue")  # the classes are numbered by the network's, not by those that are there
    assert told(run, tmp_path) == [f"test of {tmp_path}: 5 images", "5 images"]
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


def test_a_folder_that_a_run_has_split_by_itself_is_split_alike(
    flowers: Path, tmp_path: Path, model: nn.Module
) -> None:
    own = make_run(flowers, tmp_path / "run", model)
    about, images = told(own, flowers, "--split", "val", "--output", str(tmp_path / "figures.json"))
    assert about.startswith(f"val of {flowers}: 4 of its 24 images")
    assert images == "4 images"
    last = json.loads((own / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads((tmp_path / "figures.json").read_text())["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    remark, whole, _ = told(own, flowers)
    assert "trained on 20 of these 24 images" in remark
    assert whole == f"all of {flowers}: 24 images"
    assert "trained on these very images" in told(own, flowers, "--split", "train")[0]
    assert set(load_split(flowers, "train").data.indices).isdisjoint(load_split(flowers, "val").data.indices)
    with pytest.raises(RetrofitError, match="no test"):
        load_split(flowers, "test")


def test_a_class_may_have_the_name_of_a_split(flowers: Path, tmp_path: Path) -> None:
    for name in ("car", "train", "ship"):
        shutil.copytree(flowers / "red", tmp_path / name)
    whole = load_split(tmp_path)
    assert (whole.name, len(whole.data), whole.data.classes) == ("all", 36, ["car", "ship", "train"])
    assert load_data(tmp_path).num_classes == 3


def test_the_python_functions_take_a_folder_and_a_split(pictures: Path, model: nn.Module) -> None:
    of_folders = {part: ImageFolder(str(pictures / part)) for part in ("train", "val")}
    parts = [evaluate(model, data, config=CONFIG) for data in of_folders.values()]
    assert evaluate(model, pictures, split="train", config=CONFIG).classes == parts[0].classes
    found = evaluate(model, str(pictures), split="all", config=CONFIG)
    assert torch.equal(found.confusion, sum(part.confusion for part in parts))
    assert str(found).startswith(f"all of {pictures}: 34 images, of train and val\n")
    assert not str(parts[0]).startswith("all")
    with pytest.raises(RetrofitError, match=r"split='val' .* ImageFolder"):
        evaluate(model, of_folders["val"], split="val", config=CONFIG)


def test_data_without_such_a_split_says_what_it_has(tmp_path: Path) -> None:
    assert len(load_split("digits", "all", image_size=8).data) == 1797
    for name, split, says in (
        ("digits", "test", "it has train and val"), ("torch/cifar10", "all", "no all"), ("digits", "tests", "'tests'")
    ):  # fmt: skip
        with pytest.raises(RetrofitError, match=says):
            load_split(name, split, root=tmp_path)


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


def test_classes_of_very_different_sizes_are_pointed_out(flowers: Path, tmp_path: Path) -> None:
    shutil.copytree(flowers, tmp_path, dirs_exist_ok=True)
    rare, *_ = (folder for folder in sorted(tmp_path.iterdir()))
    common = tmp_path / "common"
    common.mkdir()
    image = next(rare.iterdir())
    for number in range(12 * len(list(rare.iterdir()))):
        shutil.copy(image, common / f"{number}{image.suffix}")
    assert "--balance sampling" in load_data(tmp_path).note
    shutil.rmtree(common)
    assert "--balance" not in load_data(tmp_path).note
