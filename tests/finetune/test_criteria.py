"""Losses, targets that are vectors, balanced sampling, a teacher; what the best epoch is chosen by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from tiny import Items, classifier, config, digits, network, same, state_of, trained
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.ops import sigmoid_focal_loss

from se_retrofit import RetrofitError
from se_retrofit.finetune import evaluate
from se_retrofit.finetune.criteria import FocalLoss, criterion_of
from se_retrofit.finetune.data import Order
from se_retrofit.finetune.targets import class_counts, image_weights, targets_of
from se_retrofit.finetune.transforms import class_names_of


def imbalanced(images: int, seed: int) -> TensorDataset:
    """Two classes that overlap, one with 5 % of the images."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(images, generator=generator) < 0.05).long()
    points = torch.randn(images, 8, generator=generator)
    points[:, 0] += 1.5 * targets
    return TensorDataset(points[:, :, None, None], targets)


@pytest.mark.parametrize(("metric", "pick"), [("f1", max), ("loss", min), ("top5", max)])
def test_the_best_epoch_is_that_of_the_chosen_metric(metric: str, pick: Any) -> None:
    result = trained(data=digits(48), recipe={"epochs": 3, "best_metric": metric})
    values = {row["epoch"]: row[f"val_{metric}"] for row in result.history[1:]}
    assert result.best_score == pick(values.values())
    assert result.best_epoch is not None
    assert values[result.best_epoch] == result.best_score
    assert result.best_accuracy == result.history[result.best_epoch]["val_accuracy"]
    assert evaluate(result.model, digits().val, config=config()).scores()[metric] == result.best_score


# Losses


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_focal_loss_is_the_papers(gamma: float) -> None:
    logits, targets = torch.randn(20, 4), torch.randint(4, (20,))
    p = logits.softmax(1)[torch.arange(20), targets]
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    torch.testing.assert_close(FocalLoss(gamma)(logits, targets), expected)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5])
    weighted = (-weight[targets] * (1 - p) ** gamma * p.log()).sum() / weight[targets].sum()
    torch.testing.assert_close(FocalLoss(gamma, weight)(logits, targets), weighted)
    if gamma == 0:
        smoothed = F.cross_entropy(logits, targets, label_smoothing=0.1)
        torch.testing.assert_close(FocalLoss(0.0, label_smoothing=0.1)(logits, targets), smoothed)


def test_the_focal_loss_of_sure_answers_has_a_gradient() -> None:
    logits = torch.tensor([[200.0, -200.0], [0.5, 0.0]], requires_grad=True)
    FocalLoss(0.5)(logits, torch.zeros(2, dtype=torch.long)).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(logits.grad[0], torch.zeros(2))
    assert logits.grad[1, 0] < 0


def test_smoothing_does_not_make_a_heavy_class_the_answer_to_every_image() -> None:
    logits, targets = torch.zeros(100, 2, requires_grad=True), torch.arange(100) % 2
    FocalLoss(0.0, torch.tensor([1.0, 9.0]), label_smoothing=0.2)(logits, targets).backward()
    assert logits.grad is not None
    # with the weights in the smoothed labels, as in PyTorch's loss, the light class's own images would be pushed away
    assert (logits.grad[targets == 0, 0] < 0).all()
    assert (logits.grad[targets == 1, 1] < 0).all()


def test_losses_by_name_and_balanced_weights_are_those_of_the_libraries() -> None:
    logits, labels, targets = torch.randn(20, 4), torch.randint(2, (20, 4)).float(), torch.randint(4, (20,))
    one_hot = F.one_hot(targets, 4).float()
    for fields, answers, expected in (
        ({"multi_label": True, "loss": "focal"}, labels, sigmoid_focal_loss(logits, labels, alpha=-1, gamma=2.0, reduction="mean")),
        ({"multi_label": True, "loss": "bce"}, labels, F.binary_cross_entropy_with_logits(logits, labels)),
        ({"loss": "bce", "label_smoothing": 0.0}, targets, F.binary_cross_entropy_with_logits(logits, one_hot)),
    ):  # fmt: skip
        torch.testing.assert_close(criterion_of(config(**fields), None, None, 4)(logits, answers), expected)

    few = torch.tensor([0] * 7 + [1] * 2 + [2])
    criterion = criterion_of(config(balance="loss"), None, TensorDataset(torch.zeros(10, 1), few), 3)
    assert isinstance(criterion, FocalLoss)
    assert criterion.gamma == 0
    assert criterion.weight is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=few.numpy())
    assert criterion.weight.tolist() == pytest.approx(list(expected))


def own_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def test_an_own_loss_trains_and_its_run_is_not_resumed_with_another_or_a_teacher(tmp_path: Path) -> None:
    own, named = network(), network()
    trained(own, criterion=own_loss, output_dir=tmp_path)
    trained(named)
    assert same(own.state_dict(), named.state_dict())
    for changes in ({}, {"criterion": nn.CrossEntropyLoss()}, {"criterion": own_loss, "teacher": network(seed=2)}):
        with pytest.raises(RetrofitError, match=r"criterion: |teacher: "):
            trained(output_dir=tmp_path, resume=True, **changes)


@pytest.mark.sweep
def test_a_teacher_is_learned_from_and_left_alone() -> None:
    recipe = {"epochs": 10, "lr": 3e-3}
    teacher = trained(network(seed=1).train(), digits().train, recipe=recipe).model
    before, modes = state_of(teacher), [module.training for module in teacher.modules()]
    # targets that say nothing: whatever is learned is the teacher's
    images = torch.stack([image for image, _ in digits().train])
    blank = TensorDataset(images, torch.full((128, 10), 0.1))
    taught = trained(None, blank, recipe=recipe, teacher=teacher, distillation=(1.0, 4.0)).model
    alone = trained(None, blank, recipe=recipe).model
    accuracies = [evaluate(model, digits().val, config=config()).accuracy for model in (taught, alone)]
    assert accuracies[0] > accuracies[1] + 0.2
    assert same(before, teacher.state_dict())
    assert [module.training for module in teacher.modules()] == modes


# Targets and sampling


def test_targets_are_found_without_images() -> None:
    def item(index: int) -> Any:
        raise AssertionError("an image was loaded")

    folder = Items(3, item)
    folder.samples = [("a.png", 2), ("b.png", 0), ("c.png", 2)]  # type: ignore[attr-defined]
    for data, found in (
        (folder, [2, 0, 2]), (ConcatDataset([folder, Subset(folder, [1])]), [2, 0, 2, 0]), (DataLoader(folder), [2, 0, 2])
    ):  # fmt: skip
        assert targets_of(data).tolist() == found  # type: ignore[union-attr]
    assert class_counts(folder, 4, False)[0].tolist() == [1, 0, 2, 0]
    assert targets_of([(torch.zeros(1), 0)]) is None
    folder.classes, folder.target_transform = ["a", "b", "c"], lambda number: number // 2  # type: ignore[attr-defined]
    assert targets_of(Subset(folder, [1, 2])).tolist() == [0, 1]  # type: ignore[union-attr]
    assert class_names_of(folder) is class_names_of(Subset(folder, [1])) is None  # of other numbers
    folder.target_transform = None  # type: ignore[attr-defined]
    assert class_names_of(folder) == ["a", "b", "c"]
    folder.targets = ["cat", "dog", "cat"]  # type: ignore[attr-defined]
    with pytest.raises(RetrofitError, match="'cat', 'dog'"):
        targets_of(folder)


def test_balanced_sampling_draws_each_class_equally_often_and_alike_on_resume() -> None:
    data = imbalanced(2000, 0)
    order = Order(data, 50, name="data", train=True, seed=0, rank=0, world=1, weights=image_weights(data))
    batches = list(order)
    drawn = torch.tensor([index for batch in batches for _, index, _ in batch])
    share = data.tensors[1][drawn].float().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 2000)
    order.start = 30
    assert list(order) == batches[30:]


POINTS = torch.zeros(64, 8, 1, 1)


def labelled(targets: Tensor) -> TensorDataset:
    return TensorDataset(POINTS, targets)


@pytest.mark.parametrize(
    ("fields", "data", "says"),
    [
        ({"balance": "sampling"}, DataLoader(imbalanced(64, 0), 32), "sampling.*needs? a Dataset"),
        ({"balance": "loss"}, [(torch.zeros(8, 1, 1), 0)] * 64, "list.*targets"),
        ({"multi_label": True, "loss": "bce"}, imbalanced(64, 0), "vectors of 2 labels"),
        ({}, labelled(torch.zeros(64, 2, dtype=torch.long)), "multi_label=True"),
        ({"multi_label": True, "loss": "bce"}, labelled(torch.full((64, 2), 2)), "0 to 1"),
        ({}, labelled(torch.full((64,), 2)), "class 2, .* 0 to 1.*num_classes"),
        ({}, labelled(torch.full((64,), -1)), "class -1, .* without a label"),
        ({}, labelled(torch.full((64,), 0.5)), r"float32 of shape \(16,\)"),
        ({}, [(POINTS[0], "cat")] * 64, r"got 'cat'$"),
        ({}, [(POINTS[0], None)] * 64, "None"),
        ({}, [(POINTS[0], [0, 1]), (POINTS[0], [1])] * 32, "one length"),
        (
            lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
            imbalanced(64, 0),
            r"shape \(16,\)",
        ),
        (lambda logits, targets: torch.tensor(1.0), imbalanced(64, 0), "without a gradient"),
        (lambda logits, targets: 1.0, imbalanced(64, 0), r"got 1\.0"),
    ],
)
def test_targets_and_losses_that_do_not_fit_are_refused(fields: Any, data: Any, says: str) -> None:
    recipe, criterion = (None, fields) if callable(fields) else (fields, None)
    with pytest.raises(RetrofitError, match=says):
        trained(classifier(8, 2), data, recipe=recipe, criterion=criterion)


@pytest.mark.parametrize("in_memory", [True, False])
def test_whole_numbers_of_any_type_are_classes_and_a_single_label_is_learned(in_memory: bool) -> None:
    def items(data: TensorDataset) -> Any:
        return data if in_memory else [data[at] for at in range(len(data))]

    losses = []
    for kind in (torch.long, torch.float):
        data = TensorDataset(torch.eye(4).repeat(8, 1), (torch.arange(32) % 4).to(kind))
        losses.append(trained(classifier(4, 4), items(data)).history[-1]["train_loss"])
    assert losses[0] == losses[1]

    points = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    labels = items(TensorDataset(points, (points[:, :1] > 0).float()))
    recipe = {"epochs": 6, "lr": 0.1, "multi_label": True, "loss": "bce", "best_metric": "f1", "weight_decay": 0.0}
    result = trained(classifier(3, 1), labels, labels, recipe)
    assert (result.best_score or 0) > 0.9
    assert result.history[-1]["val_map"] > 0.9
