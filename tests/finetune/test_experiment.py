"""A folder that holds one experiment does not answer for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import config, network
from torch.utils.data import DataLoader, Subset, TensorDataset

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import NamedData, finetune
from se_retrofit.finetune.criteria import describe_criterion
from se_retrofit.finetune.experiment import describe_data, describe_run


def other_images(data: NamedData) -> NamedData:
    images, classes = (torch.stack(list(column)) for column in zip(*data.train, strict=True))
    return NamedData(TensorDataset(-images, classes), data.val, 10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: NamedData) -> Path:
    from tiny import config, network

    output = tmp_path_factory.mktemp("run")
    finetune(network(), digits.train, digits.val, config=config(epochs=1), output_dir=output, quiet=True)
    return output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("weights", r"starting weights: '\w+' then, '\w+' now.*torch\.manual_seed"),
        ("placement", r"SE options, placement: 'auto' then, 'post' now"),
        ("reduction", r"SE options, reduction: 8 then, 4 now"),
        ("plain", r"SE options: .* then, None now"),
        ("fewer images", r"training data, length: 256 then, 200 now"),
        ("other images", r"training data, samples: '\w+' then, '\w+' now"),
        ("other validation", r"validation data, length: 100 then, 90 now"),
        ("no validation", r"validation data: .* then, None now"),
    ],
)
def test_a_run_is_not_resumed_as_another_experiment(finished: Path, digits: NamedData, change: str, says: str) -> None:
    data: Any = digits
    model = network()
    if change == "weights":
        model = network(seed=1)
    elif change in ("placement", "reduction"):
        model = add_se(network(se=False), **({"placement": "post"} if change == "placement" else {"reduction": 4}))
    elif change == "plain":
        model = network(se=False)
    elif change == "fewer images":
        data = NamedData(Subset(digits.train, range(200)), digits.val, 10)
    elif change == "other images":
        data = other_images(digits)
    elif change == "other validation":
        data = NamedData(digits.train, Subset(digits.val, range(90)), 10)
    else:
        data = NamedData(digits.train, None, 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    written = (finished / "last" / "training.json").read_bytes()
    with pytest.raises(RetrofitError, match=says):
        finetune(model, data.train, data.val, config=config(epochs=1), output_dir=finished, resume=True, quiet=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (finished / "last" / "training.json").read_bytes() == written


def test_what_a_run_was_is_written_beside_it(finished: Path, digits: NamedData) -> None:
    written = yaml.safe_load((finished / "run.yaml").read_text())
    assert written["config"] == config(epochs=1).to_dict()
    assert written["experiment"] == {
        **describe_run(network(), digits.train, digits.val),
        **describe_criterion(None, None, (0.5, 4.0)),
    }


def test_a_data_set_is_the_same_after_it_was_moved_and_another_after_an_image_was_changed(tmp_path: Path) -> None:
    from pictures import make_folder
    from PIL import Image
    from torchvision.datasets import ImageFolder

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
