from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import said as run
from PIL import Image
from safetensors.torch import load_file
from sweeps import swept
from torch import nn

from se_retrofit import RetrofitError, add_se, load_retrofitted, save_retrofitted
from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, evaluate, finetune, load_data
from se_retrofit.finetune.transforms import class_names
from se_retrofit.models import Base, load_checkpoint

RECIPE = FinetuneConfig(epochs=1, batch_size=8, image_size=32, workers=0, cpu=True, lr=1e-3)
NAMES = {"first": ("blue", "red"), "renamed": ("green", "yellow"), "more": ("blue", "green", "red")}
NETWORKS = swept(["timm/test_resnet"], ["torchvision/shufflenet_v2_x0_5"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three image folders, of other classes each."""
    root = tmp_path_factory.mktemp("pictures")
    for folder, names in NAMES.items():
        for name in names:
            for part, count in (("train", 8), ("val", 3)):
                place = root / folder / part / name
                place.mkdir(parents=True)
                for number in range(count):
                    Image.new("RGB", (40 + number, 36), name).save(place / f"{number}.png")
    return root


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return add_se(Base.of(name, num_classes=2).build())


@pytest.fixture(scope="module", params=NETWORKS)
def first(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a fine-tune on the first folder."""
    data = load_data(pictures / "first")
    output = tmp_path_factory.mktemp("first")
    finetune(built(request.param), data.train, data.val, config=RECIPE, output_dir=output, quiet=True)
    return output


def started(result: Path, data: Any, output: Path, recipe: FinetuneConfig) -> tuple[dict[str, torch.Tensor], Any]:
    """A run that begins with the weights of a result; these, as it evaluates them before its first step, and what it came to."""
    found: dict[str, torch.Tensor] = {}

    def note(facts: Facts) -> None:
        if facts.epoch == 0:
            found.update({key: value.clone() for key, value in facts.model.state_dict().items()})

    model = load_retrofitted(result / "best")
    callbacks = Callbacks(after_evaluation=note)
    return found, finetune(
        model, data.train, data.val, config=recipe, output_dir=output, quiet=True, callbacks=callbacks
    )


@pytest.mark.parametrize(("folder", "kept"), [("first", True), ("renamed", False), ("more", False)])
def test_a_run_begins_with_the_weights_of_a_result_and_a_new_head_for_other_classes(
    first: Path, pictures: Path, tmp_path: Path, folder: str, kept: bool
) -> None:
    data = load_data(pictures / folder)
    # the image size is the result's own
    begun, result = started(first, data, tmp_path, RECIPE.replace(num_classes=data.num_classes, image_size=None))
    weights = load_file(first / "best" / "weights.safetensors")
    for key, value in weights.items():
        same = begun[key].shape == value.shape and torch.equal(begun[key], value)
        assert same == (kept or not key.startswith("fc.")), key
    again = load_retrofitted(result.directory)
    assert class_names(again) == list(NAMES[folder])
    assert evaluate(again, data.val, config=RECIPE).accuracy == result.best_accuracy


def test_it_is_said_what_becomes_of_a_head_for_other_classes(
    first: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_data(pictures / "renamed")
    model = load_retrofitted(first / "best")
    finetune(model, data.train, config=RECIPE.replace(num_classes=2))
    trained_on = "the network was fine-tuned on the classes blue, red, and the data has green, yellow: "
    assert f"{trained_on}the head is new" in capsys.readouterr().out
    model = load_retrofitted(first / "best")
    finetune(model, data.train, config=RECIPE)
    assert f"{trained_on}the head is kept, its numbers mean other classes now" in capsys.readouterr().out


@pytest.mark.sweep
def test_from_the_command_line_a_result_is_the_model(first: Path, pictures: Path, tmp_path: Path) -> None:
    options = ("--epochs", 1, "--batch-size", 8, "--cpu", "--workers", 0)
    said = run("finetune", first, "--data", pictures / "renamed", *options, "--output", tmp_path / "renamed")
    assert "the data has green, yellow: the head is new" in said
    second = run("finetune", tmp_path / "renamed", "--data", pictures / "more", *options, "--output", tmp_path / "more")
    assert "the data has blue, green, red: the head is new" in second
    assert "resumed" in run("finetune", "--resume", tmp_path / "more")
    assert "9 images: accuracy" in run("evaluate", tmp_path / "more", "--data", pictures / "more", "--cpu")
    assert load_retrofitted(tmp_path / "more" / "best").fc.out_features == 3


def test_a_loaded_network_tells_its_base_as_long_as_it_fits(first: Path, tmp_path: Path) -> None:
    model = load_retrofitted(first / "best")
    again = load_retrofitted(save_retrofitted(model, tmp_path / "again"))
    assert again.state_dict().keys() == model.state_dict().keys()
    model.fc = nn.Sequential(nn.Linear(model.fc.in_features, 8), nn.ReLU(), nn.Linear(8, 2))
    save_retrofitted(model, tmp_path / "changed")
    with pytest.raises(RetrofitError, match="does not say how to build its base network"):
        load_retrofitted(tmp_path / "changed")


def test_a_result_that_is_given_as_a_checkpoint_is_told_where_it_goes(first: Path) -> None:
    bare = Base.of("timm/test_resnet", num_classes=2).build()
    with pytest.raises(
        RetrofitError, match=r"is a folder, and a checkpoint is a file; .* its folder goes in MODEL's place"
    ):
        load_checkpoint(bare, first)
    with pytest.raises(RetrofitError, match=r"It holds SE: give its folder to load_retrofitted, or in MODEL's place"):
        load_checkpoint(bare, first / "best" / "weights.safetensors")
