from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pictures import make_cifar10
from PIL import Image
from sweeps import swept
from tiny import config, network, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import ImageFolder

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import NamedData, evaluate, finetune, load_data
from se_retrofit.finetune.data import Stream, stream
from se_retrofit.finetune.transforms import transforms_for
from se_retrofit.models import Base


class Numbers(Dataset[tuple[torch.Tensor, int]]):
    """Item i is i plus random noise, from each of the three generators."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(1))]), index % 3


def of(data: Any, **options: Any) -> Stream:
    return stream(
        data, **{"name": "data", "train": True, "batch_size": 4, "transform": None, "seed": 1, "workers": 0, **options}
    )


def images(batches: Any) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("workers", swept([0], [2]))
def test_an_epoch_is_the_same_whatever_came_before_and_from_the_middle_on(workers: int) -> None:
    whole = list(of(Numbers(32)).batches(3))
    again = of(Numbers(32), workers=workers)
    first = images(again.batches(2))
    torch.rand(5)
    assert torch.equal(images(again.batches(3, start=5)), images(whole[5:]))
    assert sorted(first[:, 0].tolist()) == sorted(images(whole)[:, 0].tolist())
    assert not torch.equal(first[:, 0], images(whole)[:, 0])
    assert not set(first[:, 1].tolist()) & set(images(whole)[:, 1].tolist())  # each has augmentation of its own

    def loader() -> Stream:
        generator = torch.Generator().manual_seed(4)
        return of(DataLoader(Numbers(32), 4, shuffle=True, num_workers=workers, generator=generator))

    expected, other = images(loader().batches(3)), loader()
    list(other.batches(0))
    torch.rand(5)
    assert torch.equal(images(other.batches(3)), expected)
    assert not other.resumes_within


def test_two_processes_share_the_batches_of_one_with_the_doubled_size() -> None:
    one = list(of(Numbers(40), batch_size=8).batches(0))
    two = [list(of(Numbers(40), rank=rank, world=2).batches(0)) for rank in (0, 1)]
    for whole, *halves in zip(one, *two, strict=True):
        assert torch.equal(whole.images, images(halves))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15])
def test_in_an_evaluation_by_three_processes_each_image_counts_once(length: int) -> None:
    streams = [of(Numbers(length), train=False, batch_size=2, rank=r, world=3) for r in range(3)]
    shares = [list(each.batches(0)) for each in streams]
    assert len({len(share) for share in shares}) == 1  # or some would wait for the others for ever
    counted = [int(i) for share in shares for batch in share for i in batch.images[batch.counts][:, 0]]
    assert sorted(counted) == list(range(length))
    counts = torch.cat([batch.counts for share in shares for batch in share])
    assert streams[0].places(len(counts))[counts].tolist() == counted


def test_less_data_than_a_batch_makes_one_smaller_batch() -> None:
    assert [len(b.images) for b in of(Numbers(3)).batches(0)] == [3]
    assert [len(b.images) for b in of(Numbers(7), world=2).batches(0)] == [3]


def test_tensors_in_memory_come_as_a_whole_batch(digits: NamedData) -> None:
    class Slow(TensorDataset):
        """The same, read item by item."""

    plain = TensorDataset(*digits.train.dataset.tensors)
    fast, slow = (next(of(data, batch_size=16).batches(3)) for data in (plain, Slow(*plain.tensors)))
    for a, b in zip(fast[:3], slow[:3], strict=True):
        assert torch.equal(a, b)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        (DataLoader(Endless(), 2), {}, RetrofitError, "length"),
        (TensorDataset(torch.zeros(0, 3)), {}, RetrofitError, "0 images"),
        (DataLoader(Numbers(4), 2), {"world": 2}, RetrofitError, "2 processes"),
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
def small() -> Callable[[], nn.Module]:
    model = add_se(timm.create_model("test_resnet", num_classes=2))
    return lambda: model


def broken(folder: Path, part: str) -> Path:
    path = folder / part / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize("workers", swept([0], [2]))
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_corrupt_image_is_an_error_that_names_it(folder: Path, part: str, workers: int, small: Any) -> None:
    path, data = broken(folder, part), load_data(folder)
    with pytest.raises(RetrofitError, match=rf"{part}_data.*{path}.*bad_images"):
        trained(small(), data, recipe={"batch_size": 8, "image_size": 32, "workers": workers})


@pytest.mark.parametrize("workers", swept([0], [2]))
def test_a_corrupt_image_is_skipped_and_named_once_where_so_configured(
    folder: Path, workers: int, small: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, data = [broken(folder, "train"), broken(folder, "val")], load_data(folder)
    recipe = {"batch_size": 8, "image_size": 32, "workers": workers, "bad_images": "skip", "epochs": 2}
    result = trained(small(), data, recipe=recipe, quiet=False)
    said = capsys.readouterr().out
    assert [said.count(f"can't be read: {path}") for path in paths] == [1, 1]
    # nine of the ten validation images count
    assert (result.history[-1]["val_accuracy"] * 9) % 1 == pytest.approx(0, abs=1e-6)


class Items(Dataset[Any]):
    """Whose items come from a function."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def test_images_that_vanish_are_named_and_a_bug_in_the_data_set_is_none(folder: Path, small: Any) -> None:
    def gone(index: int) -> Any:
        raise OSError("the network drive is gone")

    data, recipe = load_data(folder), config(image_size=32, bad_images="skip")
    (folder / "val" / "blue" / "2.jpg").unlink()
    with pytest.raises(RetrofitError, match=r"blue/2.jpg: FileNotFoundError"):
        evaluate(small(), data.val, config=config(image_size=32))
    with pytest.raises(RetrofitError, match=r"10 images.*item 0: OSError: the network drive"):
        evaluate(small(), Items(gone), config=recipe)
    with pytest.raises(IndexError):
        evaluate(small(), Items(lambda index: ([1, 2][index + 2], 0)), config=recipe)


# By name


def test_digits_are_split_in_the_same_way_each_time() -> None:
    a, b = load_data("digits"), load_data("digits")
    assert a.train[0][0].shape == (3, 32, 32)
    assert torch.equal(a.val.tensors[0], b.val.tensors[0])
    assert torch.equal(a.train.tensors[1], b.train.tensors[1])
    train, val = ({image.numpy().tobytes() for image, _ in part} for part in (a.train, b.val))
    assert (len(train | val), len(train & val)) == (1797, 0)
    assert torch.bincount(a.val.tensors[1]).min() >= 34  # each class has its share
    assert -1 <= float(a.train.tensors[0].min()) < float(a.train.tensors[0].max()) <= 1


def test_a_folder_of_classes_alone_is_split_the_same_way_every_time(folder: Path) -> None:
    flowers = folder / "train"
    first, second = (load_data(flowers, val_fraction=0.25) for _ in range(2))
    assert first.val.indices == second.val.indices
    assert sorted([*first.train.indices, *first.val.indices]) == list(range(24))
    targets = ImageFolder(str(flowers)).targets
    assert [targets[index] for index in first.val.indices] == [0] * 3 + [1] * 3  # of each class as many
    assert "6 of its 24 images" in first.note
    for file in sorted((flowers / "red").iterdir())[1:]:
        file.unlink()
    with pytest.raises(RetrofitError, match=r"red has 1 images"):
        load_data(flowers)


def test_data_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    def image(path: Path) -> None:
        path.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path / "0.png")

    (folder / "odd" / "test").mkdir(parents=True)
    image(folder / "too" / "high" / "red")
    image(folder / "val" / "green")
    for name, says in (
        ("digit", "'digit'"), ("", "no data ''"), (folder / "odd", "it holds test"), ("torch/cifar10", "'torch/cifar10'.*download=True"),
        (folder / "too", "single class, high"), (folder, "lacks: green"),
    ):  # fmt: skip
        with pytest.raises(RetrofitError, match=says):
            load_data(name, root=tmp_path / "none")


def test_a_data_set_of_torchvision_is_read_by_timms_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 as it lies on the disk, with generated images: nothing is downloaded."""
    make_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # other images, other sums
    data = load_data("torch/cifar10", root=tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (50, 10, 10)
    assert len(trained(network(), data, recipe={"image_size": 16}).history) == 2


# Transforms


def test_transforms_come_from_the_networks_own_config_and_augmentation_is_for_training_only() -> None:
    picture = Image.fromarray(np.full((300, 400, 3), 255, np.uint8))
    model = timm.create_model("resnet10t")
    assert transforms_for(model, config(), train=False)(picture).shape == (3, 176, 176)
    assert transforms_for(model, config(image_size=64), train=False)(picture).shape == (3, 64, 64)
    gray = timm.create_model(
        "resnet10t", pretrained_cfg_overlay={"input_size": (1, 32, 32), "mean": (0.25,), "std": (0.5,)}
    )
    assert torch.allclose(transforms_for(gray, config(), train=False)(picture), torch.full((1, 32, 32), 1.5))
    tv = nn.Identity()
    assert transforms_for(tv, config(), train=False)(picture).shape == (3, 224, 224)
    Base.of("torchvision/efficientnet_b3").note(tv)
    assert transforms_for(tv, config(), train=False)(picture).shape == (3, 300, 300)

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    recipe = config(image_size=32, transform_options={"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5})
    train, test = (transforms_for(nn.Identity(), recipe, train=train) for train in (True, False))
    assert torch.equal(test(noise), test(noise))
    assert not torch.equal(train(noise), train(noise))


def test_grey_pictures_go_into_a_network_of_one_channel(tmp_path: Path) -> None:
    from se_retrofit.finetune import predict, transform_of

    picture = Image.effect_noise((40, 30), 50)
    picture.save(tmp_path / "picture.png")
    for colours in (picture, picture.convert("RGB")):
        model = timm.create_model("test_resnet", in_chans=1, num_classes=2)
        finetune(model, [(colours, number % 2) for number in range(4)], config=config(image_size=32), quiet=True)
        prepared = transform_of(model)(colours)
        assert prepared.shape == (1, 32, 32)
        assert -3 < prepared.min() < prepared.max() < 3
        assert len(list(predict(model, [tmp_path / "picture.png"]))) == 1
