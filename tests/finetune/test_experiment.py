"""A folder that holds one experiment does not answer for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pictures import make_folder
from PIL import Image
from tiny import config, network, same, state_of, trained
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import NamedData
from se_retrofit.finetune.experiment import describe_data, describe_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: NamedData) -> Path:
    output = tmp_path_factory.mktemp("run")
    trained(network(), digits, output_dir=output)
    return output


def other_images(data: NamedData) -> NamedData:
    images, classes = (torch.stack(list(column)) for column in zip(*data.train, strict=True))
    return NamedData(TensorDataset(-images, classes), data.val, 10)


DATA: dict[str, Any] = {
    "fewer images": lambda data: NamedData(Subset(data.train, range(100)), data.val, 10),
    "other images": other_images,
    "other validation": lambda data: NamedData(data.train, Subset(data.val, range(40)), 10),
    "no validation": lambda data: NamedData(data.train, None, 10),
}
NETWORKS: dict[str, Any] = {
    "weights": lambda: network(seed=1),
    "placement": lambda: add_se(network(se=False), placement="post"),
    "reduction": lambda: add_se(network(se=False), reduction=4),
    "plain": lambda: network(se=False),
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("weights", r"starting weights: '\w+' then, '\w+' now.*torch\.manual_seed"),
        ("placement", r"SE options, placement: 'auto' then, 'post' now"),
        ("reduction", r"SE options, reduction: 8 then, 4 now"),
        ("plain", r"SE options: .* then, None now"),
        ("fewer images", r"training data, length: 128 then, 100 now"),
        ("other images", r"training data, samples: '\w+' then, '\w+' now"),
        ("other validation", r"validation data, length: 50 then, 40 now"),
        ("no validation", r"validation data: .* then, None now"),
    ],
)
def test_a_run_is_not_resumed_as_another_experiment(finished: Path, digits: NamedData, change: str, says: str) -> None:
    model, data = NETWORKS.get(change, network)(), DATA.get(change, lambda data: data)(digits)
    before, written = state_of(model), (finished / "last" / "training.json").read_bytes()
    with pytest.raises(RetrofitError, match=says):
        trained(model, data, output_dir=finished, resume=True)
    assert same(before, model.state_dict())
    assert (finished / "last" / "training.json").read_bytes() == written


def test_what_a_run_was_is_written_beside_it(finished: Path, digits: NamedData) -> None:
    written = yaml.safe_load((finished / "run.yaml").read_text())
    assert written["config"] == config().to_dict()
    described = describe_run(network(), digits.train, digits.val)
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

    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            image, target = super().__getitem__(index)
            return image + torch.randn(image.shape, generator=generator), target

    data = Noisy(torch.zeros(20, 3, 4, 4), torch.arange(20))
    assert describe_data(data) == describe_data(data)
    assert describe_data(DataLoader(data, 5)) == {**describe_data(data), "batch size": 5}
