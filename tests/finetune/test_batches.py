from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import make_cifar10, make_folder
from PIL import Image
from sweeps import swept
from tiny import config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import evaluate, finetune, load_data
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
        import random

        return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(1))]), index % 3


def of(data: Any, **options: Any) -> Stream:
    return stream(
        data, **{"name": "data", "train": True, "batch_size": 4, "transform": None, "seed": 1, "workers": 0, **options}
    )


def images(batches: Any) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_middle_on_are_those_of_the_whole_epoch(workers: int) -> None:
    whole = list(of(Numbers(32)).batches(3))
    torch.rand(5)
    again = of(Numbers(32), workers=workers)
    list(again.batches(2))
    rest = list(again.batches(3, start=5))
    assert len(rest) == 3
    assert torch.equal(images(rest), images(whole[5:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_loader_is_the_same_whatever_came_before(workers: int) -> None:
    def loader() -> Stream:
        return of(
            DataLoader(Numbers(32), 4, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(4))
        )

    whole = images(loader().batches(3))
    again = loader()
    list(again.batches(0))
    torch.rand(5)
    assert torch.equal(images(again.batches(3)), whole)
    assert not again.resumes_within


def test_epochs_have_orders_and_augmentation_of_their_own() -> None:
    batches = of(Numbers(32))
    first, second = images(batches.batches(0)), images(batches.batches(1))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist())
    assert not torch.equal(first[:, 0], second[:, 0])
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())


def test_two_processes_share_the_batches_of_one_with_the_doubled_size() -> None:
    one = list(of(Numbers(40), batch_size=8).batches(0))
    two = [list(of(Numbers(40), rank=rank, world=2).batches(0)) for rank in (0, 1)]
    for whole, *halves in zip(one, *two, strict=True):
        assert torch.equal(whole.images, images(halves))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15])
@pytest.mark.parametrize("loader", [False, True])
def test_in_an_evaluation_by_three_processes_each_image_counts_once(length: int, loader: bool) -> None:
    data: Any = DataLoader(Numbers(length), 2) if loader else Numbers(length)
    shares = [list(of(data, train=False, batch_size=2, rank=rank, world=3).batches(0)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1  # or some would wait for the others for ever
    counted = [int(i) for share in shares for batch in share for i in batch.images[batch.counts][:, 0]]
    assert sorted(counted) == list(range(length))


def test_less_data_than_a_batch_makes_one_smaller_batch() -> None:
    assert [len(b.images) for b in of(Numbers(3)).batches(0)] == [3]
    assert [len(b.images) for b in of(Numbers(7), world=2).batches(0)] == [3]


def test_iterable_data_works() -> None:
    class Count(IterableDataset[Any]):
        def __len__(self) -> int:
            return 9

        def __iter__(self) -> Any:
            return iter([(torch.tensor([float(i)]), i % 2) for i in range(9)])

    assert [len(b.images) for b in of(Count()).batches(0)] == [4, 4]
    assert [len(b.images) for b in of(Count(), train=False).batches(0)] == [4, 4, 1]
    with pytest.raises(RetrofitError, match=r"several processes"):
        of(Count(), world=2)


def test_data_without_a_length_or_of_another_type_is_refused() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(RetrofitError, match=r"doesn't know its length"):
        of(Endless())
    with pytest.raises(RetrofitError, match=r"0 images"):
        of(TensorDataset(torch.zeros(0, 3)))
    with pytest.raises(TypeError, match=r"must be a Dataset"):
        of(7)


# Images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pictures")


def small_network(num_classes: int = 2) -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_se(timm.create_model("resnet10t", num_classes=num_classes))


def broken(folder: Path, part: str) -> Path:
    path = folder / part / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize("workers", swept([0], [2]))
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_corrupt_image_is_an_error_that_names_it(folder: Path, part: str, workers: int) -> None:
    path = broken(folder, part)
    data = load_data(folder)
    with pytest.raises(RetrofitError, match=rf'{part}_data can\'t be read: {path}: .*bad_images="skip"'):
        finetune(
            small_network(),
            data.train,
            data.val,
            config=config(batch_size=8, image_size=32, workers=workers),
            quiet=True,
        )


@pytest.mark.parametrize("workers", swept([0], [2]))
def test_a_corrupt_image_is_skipped_and_named_once_where_so_configured(
    folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [broken(folder, "train"), broken(folder, "val")]
    data = load_data(folder)
    recipe = config(batch_size=8, image_size=32, workers=workers, bad_images="skip", epochs=3)
    result = finetune(small_network(), data.train, data.val, config=recipe)
    said = capsys.readouterr().out
    for path in paths:
        assert said.count(f"skipped an image that can't be read: {path}") == 1
    # nine of the ten validation images count
    assert (result.history[-1]["val_accuracy"] * 9) % 1 == pytest.approx(0, abs=1e-6)


def test_a_vanished_image_is_named(folder: Path) -> None:
    data = load_data(folder)
    (folder / "val" / "blue" / "2.jpg").unlink()
    with pytest.raises(RetrofitError, match=r"blue/2.jpg: FileNotFoundError"):
        evaluate(small_network(), data.val, config=config(image_size=32))


def test_many_unreadable_images_in_a_row_are_an_error_in_any_case() -> None:
    class Gone(Dataset[Any]):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> Any:
            raise OSError("the network drive is gone")

    with pytest.raises(
        RetrofitError, match=r"10 images of data in a row can't be read; first item 0: OSError: the network drive"
    ):
        evaluate(small_network(), Gone(), config=config(bad_images="skip"))


def test_a_bug_in_the_data_set_is_no_corrupt_image() -> None:
    class Buggy(Dataset[Any]):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> Any:
            return [1, 2][index + 2], 0

    with pytest.raises(IndexError):
        evaluate(small_network(), Buggy(), config=config(bad_images="skip"))


# By name


def test_digits_are_split_in_the_same_way_each_time() -> None:
    a, b = load_data("digits"), load_data("digits")
    assert a.num_classes == 10
    assert a.train[0][0].shape == (3, 32, 32)
    assert torch.equal(a.val.tensors[0], b.val.tensors[0])
    assert torch.equal(a.train.tensors[1], b.train.tensors[1])
    assert len(a.train) + len(a.val) == 1797
    assert torch.bincount(a.val.tensors[1]).min() >= 34  # each class has its share
    assert -1 <= float(a.train.tensors[0].min()) < float(a.train.tensors[0].max()) <= 1


def test_data_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"no data 'digit': give digits, a folder"):
        load_data("digit")
    (folder / "odd" / "test").mkdir(parents=True)
    with pytest.raises(RetrofitError, match=r"must hold the folders train and val.*it holds test"):
        load_data(folder / "odd")
    with pytest.raises(RetrofitError, match=r"timm can't open 'torch/cifar10'.*--download"):
        load_data("torch/cifar10", root=tmp_path / "none")
    (folder / "too" / "high" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "too" / "high" / "red" / "0.png")
    with pytest.raises(RetrofitError, match="too holds a single class, high"):
        load_data(folder / "too")
    (folder / "val" / "green").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "val" / "green" / "0.png")
    with pytest.raises(RetrofitError, match=r"holds classes that the training folder lacks: green"):
        load_data(folder)


def test_a_data_set_of_torchvision_is_read_by_timms_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 as it lies on the disk, with generated images: nothing is downloaded."""
    make_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # other images, other sums
    data = load_data("torch/cifar10", root=tmp_path)
    assert (len(data.train), len(data.val), data.num_classes) == (50, 10, 10)
    result = finetune(small_network(10), data.train, data.val, config=config(epochs=1, image_size=32), quiet=True)
    assert len(result.history) == 2


# Transforms


def test_transforms_come_from_the_networks_own_config() -> None:
    import timm

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


def test_augmentation_is_for_training_only() -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    recipe = config(image_size=32, transform_options={"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5})
    train, test = (transforms_for(nn.Identity(), recipe, train=train) for train in (True, False))
    assert torch.equal(test(picture), test(picture))
    assert not torch.equal(train(picture), train(picture))
