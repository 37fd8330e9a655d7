"""An evaluation measures the images that were meant, and says which they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from pictures import make_folder
from torch import nn
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner, Result

from se_retrofit import RetrofitError, add_se
from se_retrofit.cli.commands import app
from se_retrofit.finetune import FinetuneConfig, evaluate, finetune, load_data, load_split

CONFIG = FinetuneConfig(cpu=True, workers=0, image_size=32, batch_size=8)


def make_run(folder: Path, output: Path) -> Path:
    """A short run on a folder of pictures."""
    data = load_data(folder)
    torch.manual_seed(0)
    model = add_se(timm.create_model("test_resnet", num_classes=2))
    finetune(model, data.train, data.val, config=CONFIG.replace(epochs=1), output_dir=output, quiet=True)
    return output


def evaluated(folder: Path, data: Path | str, *options: str) -> Result:
    arguments = ["evaluate", str(folder), "--data", str(data), "--cpu", "--workers", "0", *options]
    return CliRunner().invoke(app, arguments)


def told(folder: Path, data: Path | str, *options: str) -> list[str]:
    """The lines that come before the table, and of how many images the one after it is."""
    said = evaluated(folder, data, *options)
    assert said.exit_code == 0, said.exception
    lines = said.output.splitlines()
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("class"))]
    return [*before, next(line.partition(":")[0] for line in lines if ": accuracy" in line)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """On pictures/train and pictures/val."""
    return make_run(pictures, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A folder of classes: 12 pictures of each."""
    return Path(shutil.copytree(pictures / "train", tmp_path_factory.mktemp("data") / "flowers"))


def test_a_folder_of_classes_is_measured_whole(run: Path, pictures: Path) -> None:
    assert told(run, pictures / "val") == [f"all of {pictures / 'val'}: 10 images", "10 images"]


def test_of_a_folder_with_splits_any_is_measured(run: Path, pictures: Path, tmp_path: Path) -> None:
    trained = "; --split val measures others"
    assert told(run, pictures) == [f"val of {pictures}: 10 images", "10 images"]
    (remark, *rest) = told(run, pictures, "--split", "train")
    assert remark == "the network was trained on these very images, so the figures flatter it" + trained
    assert rest == [f"train of {pictures}: 24 images", "24 images"]
    (remark, *rest) = told(run, pictures, "--split", "all")
    assert remark == "the network was trained on 24 of these 34 images, so the figures flatter it" + trained
    assert rest == [f"all of {pictures}: 34 images, of train and val", "34 images"]
    with pytest.raises(RetrofitError, match="has no test: it has train and val"):
        raise evaluated(run, pictures, "--split", "test").exception or AssertionError
    three = tmp_path / "three"
    shutil.copytree(pictures, three)
    shutil.copytree(pictures / "val", three / "test")
    shutil.rmtree(three / "test" / "blue")  # the classes are numbered by the network's, not by those that are there
    assert told(run, three, "--split", "test") == [f"test of {three}: 5 images", "5 images"]
    assert told(run, three) == [f"val of {three}: 10 images", "10 images"]


def test_a_folder_with_a_test_alone_or_beside_the_training_images_means_the_test(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures / "val", tmp_path / "test")
    assert told(run, tmp_path) == [f"test of {tmp_path}: 10 images", "10 images"]
    with pytest.raises(RetrofitError, match="has no val: it has test"):
        load_split(tmp_path, "val")
    shutil.copytree(pictures / "train", tmp_path / "train")
    assert load_split(tmp_path).name == "test"
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(RetrofitError, match="has no val and no test: it has train"):
        load_split(tmp_path)
    assert len(load_split(tmp_path, "train").data) == 24


def test_a_folder_that_a_run_has_split_by_itself_is_split_alike(flowers: Path, tmp_path: Path) -> None:
    own = make_run(flowers, tmp_path / "run")
    about, images = told(own, flowers, "--split", "val", "--output", str(tmp_path / "figures.json"))
    assert (about, images) == (f"val of {flowers}: 4 of its 24 images, which finetune holds out", "4 images")
    last = json.loads((own / "metrics.jsonl").read_text().splitlines()[-1])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    trained = "the network was trained on {}, so the figures flatter it; --split val measures others"
    assert told(own, flowers)[:2] == [trained.format("20 of these 24 images"), f"all of {flowers}: 24 images"]
    assert told(own, flowers, "--split", "train")[0] == trained.format("these very images")
    assert set(load_split(flowers, "train").data.indices).isdisjoint(load_split(flowers, "val").data.indices)
    with pytest.raises(RetrofitError, match="has no test: it is a folder of classes, which has all, and val and train"):
        load_split(flowers, "test")


def test_a_class_may_have_the_name_of_a_split(flowers: Path, tmp_path: Path) -> None:
    for name in ("car", "train", "ship"):
        shutil.copytree(flowers / "red", tmp_path / name)
    whole = load_split(tmp_path)
    assert (whole.name, len(whole.data), whole.data.classes) == ("all", 36, ["car", "ship", "train"])
    assert load_data(tmp_path).num_classes == 3


def test_the_python_functions_take_a_folder_and_a_split(pictures: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    of_folders = {part: ImageFolder(str(pictures / part)) for part in ("train", "val")}
    for part, data in of_folders.items():
        found = evaluate(model, pictures, split=part, config=CONFIG)
        assert found.classes == evaluate(model, data, config=CONFIG).classes
    found = evaluate(model, str(pictures), split="all", config=CONFIG)
    parts = [evaluate(model, data, config=CONFIG) for data in of_folders.values()]
    assert torch.equal(found.confusion, sum(part.confusion for part in parts))
    assert str(found).startswith(f"all of {pictures}: 34 images, of train and val\n")
    assert not str(parts[0]).startswith("all")
    with pytest.raises(RetrofitError, match=r"split='val' chooses among .* an? ImageFolder is measured whole"):
        evaluate(model, of_folders["val"], split="val", config=CONFIG)


def test_data_without_such_a_split_says_what_it_has(tmp_path: Path) -> None:
    assert len(load_split("digits", "all", image_size=8).data) == 1797
    with pytest.raises(RetrofitError, match="digits has no test: it has train and val"):
        load_split("digits", "test")
    with pytest.raises(RetrofitError, match="take train, val or test"):
        load_split("torch/cifar10", "all", root=tmp_path)
    with pytest.raises(RetrofitError, match="split must be one of train, val, test, all, got 'tests'"):
        load_split("digits", "tests")
    with pytest.raises(RetrofitError, match="it has no folders"):
        load_split(tmp_path)
    with pytest.raises(RetrofitError, match="no data 'nowhere'"):
        load_split("nowhere")


def test_classes_that_the_network_does_not_know_are_refused(run: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "val" / "red", tmp_path / "green")
    assert "the network was fine-tuned on the classes blue, red" in str(evaluated(run, tmp_path).exception)
    (tmp_path / "green").rename(tmp_path / "red")  # of one that it knows there need be no other
    assert told(run, tmp_path) == [f"all of {tmp_path}: 5 images", "5 images"]
    with pytest.raises(RetrofitError, match="holds a single class, red"):
        evaluate(nn.Linear(1, 2), tmp_path, config=CONFIG)


def test_an_image_that_can_not_be_read_is_named_in_the_whole_of_a_folder_too(pictures: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(pictures, tmp_path / "pictures")
    (broken / "val" / "red" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(RetrofitError, match=r"val.red.0\.jpg"):
        evaluate(timm.create_model("test_resnet", num_classes=2), broken, split="all", config=CONFIG)
