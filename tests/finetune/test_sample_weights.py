from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_processes import RECIPE as PROCESSES
from test_processes import launch, read
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig, finetune
from se_retrofit.finetune.criteria import criterion_of, distillation_loss, loss_by
from se_retrofit.finetune.data import stream

RECIPE = FinetuneConfig(
    epochs=2, batch_size=16, lr=0.02, cpu=True, workers=0, weight_decay=0.0, label_smoothing=0.0, sample_weights=True,
    optimizer="momentum", clip_grad=None, warmup_ratio=0.0,
)  # fmt: skip


def points(number: int = 64, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, two classes that one input tells, and weights that follow from the inputs."""
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] > 0).long(), inputs[:, 1].abs()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 2)


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def items() -> list[Any]:
    return [(x, int(y), float(w)) for x, y, w in zip(*points(), strict=True)]


@pytest.mark.parametrize(
    ("data", "workers"),
    [
        (TensorDataset(*points()), 0),
        (Subset(TensorDataset(*points()), range(3, 60)), 0),
        (items(), 0),
        (items(), 2),
        (Stream(items()), 0),
        (DataLoader(TensorDataset(*points()), 16, shuffle=True), 0),
        (DataLoader(items(), 16), 0),
    ],
    ids=["tensors", "subset", "items", "workers", "iterable", "loader of tensors", "loader of items"],
)
def test_each_image_comes_with_its_weight(data: Any, workers: int) -> None:
    batches = stream(data, name="train_data", train=True, batch_size=16, transform=None, weighted=True, workers=workers)
    seen = 0
    for batch in batches.batches(0):
        assert batch.weights is not None
        assert batch.weights.dtype == torch.float32
        torch.testing.assert_close(batch.weights, batch.images[:, 1].abs())
        seen += len(batch.weights)
    assert seen >= 48


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"label_smoothing": 0.1}, {"criterion": "focal"}, {"criterion": "bce"},
        {"criterion": "bce", "multi_label": True}, {"criterion": "focal", "multi_label": True},
    ],
)  # fmt: skip
def test_an_image_counts_in_each_loss_by_its_weight(changes: dict[str, Any]) -> None:
    recipe = RECIPE.replace(**changes)
    logits, weights = torch.randn(12, 3, requires_grad=True), torch.rand(12)
    targets = torch.randint(2, (12, 3)).float() if recipe.multi_label else torch.randint(3, (12,))
    weighted = loss_by(criterion_of(recipe, None, None, 3), logits, targets, weights)
    mean = criterion_of(recipe.replace(sample_weights=False), None, None, 3)
    each = torch.stack([mean(logits[i : i + 1], targets[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(weighted, (weights * each).mean())
    torch.testing.assert_close(
        distillation_loss(logits, logits.flip(0), recipe, weights),
        torch.stack([
            weights[i] * distillation_loss(logits[i : i + 1], logits.flip(0)[i : i + 1], recipe) for i in range(12)
        ]).mean(),
    )  # fmt: skip


def test_weights_of_images_and_of_classes_are_multiplied() -> None:
    inputs, targets, weights = points()
    data = TensorDataset(inputs, targets, weights)
    recipe = RECIPE.replace(class_weights="balanced")
    logits = torch.randn(64, 2, requires_grad=True)
    by_class = criterion_of(recipe.replace(sample_weights=False), None, data, 2)
    criterion = criterion_of(recipe, None, data, 2)
    torch.testing.assert_close(loss_by(criterion, logits, targets, torch.ones(64)), by_class(logits, targets))
    counts = torch.bincount(targets)
    of_class = (64 / (2 * counts))[targets]
    expected = (weights * of_class * F.cross_entropy(logits, targets, reduction="none")).mean() / of_class.mean()
    torch.testing.assert_close(loss_by(criterion, logits, targets, weights), expected)


def test_images_without_weight_teach_nothing() -> None:
    inputs, targets, _ = points(256)
    wrong = torch.arange(256) % 4 > 0
    told = torch.where(wrong, 1 - targets, targets)
    val = TensorDataset(*points(256, seed=2)[:2])
    accuracy = {}
    for name, weights in (("equal", torch.ones(256)), ("weighted", 4.0 * ~wrong)):
        result = finetune(
            classifier(), TensorDataset(inputs, told, weights), val, config=RECIPE.replace(epochs=4), quiet=True
        )
        accuracy[name] = result.history[-1]["val_accuracy"]
    assert accuracy["equal"] < 0.4
    assert accuracy["weighted"] > 0.85


def trained(data: Any, **changes: Any) -> Tensor:
    model = classifier()
    finetune(model, data, config=RECIPE.replace(**changes), quiet=True)
    return model.weight.detach()


def test_weights_of_one_train_as_none_do() -> None:
    inputs, targets, _ = points()
    ones = trained(TensorDataset(inputs, targets, torch.ones(64)))
    torch.testing.assert_close(ones, trained(TensorDataset(inputs, targets), sample_weights=False))


def test_accumulated_batches_add_up_to_one_large_batch_whatever_their_weights() -> None:
    data = TensorDataset(*points())
    one = trained(data, batch_size=64)
    torch.testing.assert_close(trained(data, grad_accum_steps=4), one)
    assert not torch.allclose(one, trained(TensorDataset(*points()[:2], torch.ones(64)), batch_size=64), rtol=1e-3)


def test_a_loss_of_ones_own_gives_that_of_each_image() -> None:
    def each(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    data, own = TensorDataset(*points()), classifier()
    finetune(own, data, config=RECIPE, criterion=each, quiet=True)
    torch.testing.assert_close(own.weight.detach(), trained(data))
    with pytest.raises(
        RetrofitError, match=r"the criterion must return the loss of each image, 16 of them .*of shape \(\)"
    ):
        finetune(classifier(), data, config=RECIPE, criterion=F.cross_entropy, quiet=True)


def test_the_validation_loss_is_not_weighted() -> None:
    inputs, targets, weights = points()
    losses = [
        finetune(classifier(), TensorDataset(*points()), val, config=RECIPE, quiet=True).history[-1]["val_loss"]
        for val in (TensorDataset(inputs, targets, weights), TensorDataset(inputs, targets))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-0.5, r"the weight of an image must be a finite number, 0 or more, got -0.5"),
        (math.nan, r"a finite number, 0 or more, got nan"),
        (math.inf, r"a finite number, 0 or more, got inf"),
        ("heavy", r"the weight of an image must be a number, got 'heavy'"),
        (None, r"the weight of an image must be a number, got None"),
    ],
)
def test_wrong_weights_are_refused(weight: Any, message: str) -> None:
    wrong = [*items()[:15], (*items()[15][:2], weight)]
    workers = 1 if weight is None else 0
    with pytest.raises(RetrofitError, match=message) as raised:  # and is no image that can't be read
        finetune(classifier(), wrong, config=RECIPE.replace(bad_images="skip", workers=workers), quiet=True)
    assert "can't be read" not in str(raised.value)


def test_data_without_weights_or_with_too_many_is_refused() -> None:
    inputs, targets, weights = points()
    pairs = TensorDataset(inputs, targets)
    for data in (pairs, DataLoader(pairs, 16), [pairs[i] for i in range(64)]):
        with pytest.raises(
            RetrofitError,
            match=r"sample_weights=True: train_data must give \(image, class, weight\), got a (tuple|list) of 2",
        ):
            finetune(classifier(), data, config=RECIPE, quiet=True)
    for shape in (weights[:, None], weights.repeat(2, 1).T):
        with pytest.raises(RetrofitError, match=r"one number for each image, got shape \(16, "):
            finetune(classifier(), TensorDataset(inputs, targets, shape), config=RECIPE, quiet=True)
    few = DataLoader(pairs, 16, collate_fn=lambda batch: (*map(torch.stack, zip(*batch, strict=True)), weights[:3]))
    with pytest.raises(RetrofitError, match=r"gives 3 weights for 16 images"):
        finetune(classifier(), few, config=RECIPE, quiet=True)
    with pytest.raises(RetrofitError, match=r"sample_weights=True: mixup and cutmix mix images"):
        RECIPE.replace(mixup=0.2)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(*points()), items(), Stream(items()), DataLoader(TensorDataset(*points()), 16),
        [(x, int(y), w) for x, y, w in zip(*points(), strict=True)],
    ],
    ids=["tensors", "items", "iterable", "loader", "items of tensors"],
)  # fmt: skip
def test_weights_that_would_be_forgotten_are_refused(data: Any) -> None:
    with pytest.raises(
        RetrofitError, match=r"train_data gives a fractional number after image and class: sample_weights=True"
    ):
        finetune(classifier(), data, config=RECIPE.replace(sample_weights=False), quiet=True)


def test_what_is_no_weight_is_passed_over() -> None:
    inputs, targets, _ = points()
    named = [(x, int(y), "name", 0.5) for x, y in zip(inputs, targets, strict=True)]
    counted = TensorDataset(inputs, targets, torch.arange(64))
    expected = trained(TensorDataset(inputs, targets), sample_weights=False)
    for data in (named, counted):
        assert torch.equal(trained(data, sample_weights=False), expected)


@pytest.mark.sweep
def test_two_processes_add_up_to_one_with_the_doubled_batch(tmp_path: Path) -> None:
    for number, (processes, batch_size) in enumerate(((1, 32), (2, 16))):
        fields = {**PROCESSES, "batch_size": batch_size, "sample_weights": True}
        done = launch(processes, tmp_path / str(number), fields, "weighted")
        assert done.returncode == 0, done.stderr
    (curve, _, weights), (curve2, _, weights2) = read(tmp_path / "0"), read(tmp_path / "1")
    assert curve2 == pytest.approx(curve, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(weights2[key], value, rtol=1e-3, atol=1e-5)
