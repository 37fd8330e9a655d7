"""Batches are the same wherever a run begins, shared out without a rest, and prepared as the network wants them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pictures import cut_short
from PIL import Image
from sweeps import swept
from tiny import Items, config, digits, trained
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig, evaluate, load_data, predict, transform_of
from se_retrofit.finetune.data import Stream, stream
from se_retrofit.finetune.transforms import transforms_for
from se_retrofit.models import Base


def number(index: int) -> tuple[torch.Tensor, int]:
    """The index, and random noise from each of the three generators."""
    return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(1))]), index % 3


def numbers(length: int) -> Items:
    return Items(length, number)


def of(data: Any, *, train: bool = True, rank: int = 0, world: int = 1, **recipe: Any) -> Stream:
    config = FinetuneConfig(**{"batch_size": 4, "seed": 1, "workers": 0, **recipe})
    return stream(data, config, None, name="data", train=train, rank=rank, world=world)


def images(batches: Any) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("workers", swept([0], [2]))
def test_an_epoch_is_the_same_whatever_came_before_and_from_the_middle_on(workers: int) -> None:
    whole = list(of(numbers(32)).batches(3))
    again = of(numbers(32), workers=workers)
    first = images(again.batches(2))
    torch.rand(5)
    assert torch.equal(images(again.batches(3, start=5)), images(whole[5:]))
    assert sorted(first[:, 0].tolist()) == sorted(images(whole)[:, 0].tolist())
    assert not torch.equal(first[:, 0], images(whole)[:, 0])
    assert not set(first[:, 1].tolist()) & set(images(whole)[:, 1].tolist())  # each has augmentation of its own

    def loader() -> Stream:
        generator = torch.Generator().manual_seed(4)
        return of(DataLoader(numbers(32), 4, shuffle=True, num_workers=workers, generator=generator))

    expected, other = images(loader().batches(3)), loader()
    list(other.batches(0))
    torch.rand(5)
    assert torch.equal(images(other.batches(3)), expected)
    assert not other.resumes_within


def test_two_processes_share_the_batches_of_one_with_the_doubled_size() -> None:
    one = list(of(numbers(40), batch_size=8).batches(0))
    two = [list(of(numbers(40), rank=rank, world=2).batches(0)) for rank in (0, 1)]
    for whole, *halves in zip(one, *two, strict=True):
        assert torch.equal(whole.images, images(halves))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15])
def test_in_an_evaluation_by_three_processes_each_image_counts_once(length: int) -> None:
    streams = [of(numbers(length), train=False, batch_size=2, rank=r, world=3) for r in range(3)]
    shares = [list(each.batches(0)) for each in streams]
    assert len({len(share) for share in shares}) == 1  # or some would wait for the others for ever
    counted = [int(i) for share in shares for batch in share for i in batch.images[batch.counts][:, 0]]
    assert sorted(counted) == list(range(length))
    counts = torch.cat([batch.counts for share in shares for batch in share])
    assert streams[0].places(len(counts))[counts].tolist() == counted


def test_less_data_than_a_batch_makes_one_smaller_batch() -> None:
    assert [len(b.images) for b in of(numbers(3)).batches(0)] == [3]
    assert [len(b.images) for b in of(numbers(7), world=2).batches(0)] == [3]


def test_tensors_in_memory_come_as_a_whole_batch() -> None:
    plain = TensorDataset(*digits().train.dataset.tensors)
    fast, slow = (next(of(data, batch_size=16).batches(3)) for data in (plain, Items(len(plain), plain.__getitem__)))
    for name in ("images", "targets", "counts"):
        assert torch.equal(getattr(fast, name), getattr(slow, name))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (DataLoader(Endless(), 2), {}, RetrofitError, "length"),
        (TensorDataset(torch.zeros(0, 3)), {}, RetrofitError, "0 images"),
        (DataLoader(numbers(4), 2), {"world": 2}, RetrofitError, "2 processes"),
        (Endless(), {}, TypeError, "Endless"),
        (7, {}, TypeError, "int"),
    ],
)
def test_data_that_cannot_be_shared_out_is_refused(data: Any, options: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        of(data, **options)


# Images


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "pictures"))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=2)


@pytest.mark.parametrize("workers", swept([0], [2]))
def test_a_corrupt_image_is_an_error_that_names_it_or_skipped_and_named_once(
    folder: Path, workers: int, small: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = paths = [cut_short(folder / part / "red" / "1.png") for part in ("train", "val")]
    data = load_data(folder)
    recipe = {"batch_size": 8, "image_size": 32, "workers": workers}
    with pytest.raises(RetrofitError, match=rf"train_data.*{train}.*bad_images"):
        trained(small, data.train, recipe=recipe)
    with pytest.raises(RetrofitError, match=rf"val_data.*{val}.*bad_images"):
        trained(small, data, recipe=recipe)
    result = trained(small, data, recipe={**recipe, "bad_images": "skip", "epochs": 2}, quiet=False)
    said = capsys.readouterr().out
    assert [said.count(f"can't be read: {path}") for path in paths] == [1, 1]
    # nine of the ten validation images count
    assert (result.history[-1]["val_accuracy"] * 9) % 1 == pytest.approx(0, abs=1e-6)


def test_images_that_vanish_are_named_and_a_bug_in_the_data_set_is_none(folder: Path, small: nn.Module) -> None:
    def gone(index: int) -> Any:
        raise OSError("the network drive is gone")

    data, recipe = load_data(folder), config(image_size=32, bad_images="skip")
    (folder / "val" / "blue" / "2.jpg").unlink()
    with pytest.raises(RetrofitError, match=r"blue/2.jpg: FileNotFoundError"):
        evaluate(small, data.val, config=config(image_size=32))
    with pytest.raises(RetrofitError, match=r"10 images.*item 0: OSError: the network drive"):
        evaluate(small, Items(32, gone), config=recipe)
    with pytest.raises(IndexError):
        evaluate(small, Items(32, lambda index: ([1, 2][index + 2], 0)), config=recipe)


def test_transforms_come_from_the_networks_own_config_and_augmentation_is_for_training_only() -> None:
    white = Image.new("RGB", (400, 300), "white")
    model, plain, noted = timm.create_model("resnet10t"), nn.Identity(), nn.Identity()
    Base.of("torchvision/efficientnet_b3").note(noted)
    for network, recipe, size in (
        (model, config(), 176), (model, config(image_size=64), 64), (plain, config(), 224), (noted, config(), 300)
    ):  # fmt: skip
        assert transforms_for(network, recipe, train=False)(white).shape == (3, size, size)
    overlay = {"input_size": (1, 32, 32), "mean": (0.25,), "std": (0.5,)}
    gray = timm.create_model("resnet10t", pretrained_cfg_overlay=overlay)
    assert torch.allclose(transforms_for(gray, config(), train=False)(white), torch.full((1, 32, 32), 1.5))

    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    recipe = config(image_size=32, transform_options={"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5})
    train, test = (transforms_for(plain, recipe, train=train) for train in (True, False))
    assert torch.equal(test(noise), test(noise))
    assert not torch.equal(train(noise), train(noise))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_pictures_go_into_a_network_of_one_channel(mode: str, tmp_path: Path) -> None:
    picture = Image.effect_noise((40, 30), 50).convert(mode)
    picture.save(tmp_path / "picture.png")
    model = timm.create_model("test_resnet", in_chans=1, num_classes=2)
    trained(model, [(picture, number % 2) for number in range(4)], recipe={"image_size": 32})
    prepared = transform_of(model)(picture)
    assert prepared.shape == (1, 32, 32)
    assert -3 < prepared.min() < prepared.max() < 3
    assert len(list(predict(model, [tmp_path / "picture.png"]))) == 1
