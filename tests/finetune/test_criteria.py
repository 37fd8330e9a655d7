"""Losses, targets that are vectors, balanced sampling, a teacher; what the best epoch is chosen by."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from tiny import config, network, same
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.ops import sigmoid_focal_loss

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig, NamedData, evaluate, finetune
from se_retrofit.finetune.criteria import FocalLoss, criterion_of
from se_retrofit.finetune.data import Order
from se_retrofit.finetune.targets import class_counts, image_weights, targets_of


def classifier(inputs: int, outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def imbalanced(images: int, seed: int) -> TensorDataset:
    """Two classes that overlap, one with 5 % of the images."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(images, generator=generator) < 0.05).long()
    points = torch.randn(images, 8, generator=generator)
    points[:, 0] += 1.5 * targets
    return TensorDataset(points[:, :, None, None], targets)


RECIPE = FinetuneConfig(epochs=8, batch_size=32, lr=0.02, cpu=True, workers=0, weight_decay=0.0, label_smoothing=0.0)


@pytest.mark.sweep
@pytest.mark.parametrize("changes", [{"balance": "loss"}, {"balance": "sampling"}])
def test_on_imbalanced_classes_balanced_weights_and_sampling_beat_the_default(changes: dict[str, Any]) -> None:
    train, val = imbalanced(1000, 1), imbalanced(1000, 2)
    default = finetune(classifier(8, 2), train, val, config=RECIPE.replace(best_metric="recall"), quiet=True)
    matching = finetune(
        classifier(8, 2), train, val, config=RECIPE.replace(best_metric="recall", **changes), quiet=True
    )
    assert default.best_score is not None
    assert matching.best_score is not None
    assert default.best_accuracy > 0.93  # type: ignore[operator]  # which says nothing: 95 % are of one class
    assert matching.best_score > default.best_score + 0.1


def test_the_best_epoch_is_that_of_the_chosen_metric(digits: NamedData) -> None:
    for metric, pick in (("f1", max), ("loss", min), ("top5", max)):
        result = finetune(network(), digits.train, digits.val, config=config(epochs=3, best_metric=metric), quiet=True)
        values = {row["epoch"]: row[f"val_{metric}"] for row in result.history[1:]}
        assert result.best_score == pick(values.values())
        assert result.best_epoch is not None
        assert values[result.best_epoch] == result.best_score
        assert result.best_accuracy == result.history[result.best_epoch]["val_accuracy"]
        assert evaluate(result.model, digits.val, config=config()).scores()[metric] == result.best_score


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


def test_smoothing_does_not_make_a_heavy_class_the_answer_to_every_image() -> None:
    logits, targets = torch.zeros(100, 2, requires_grad=True), torch.arange(100) % 2
    FocalLoss(0.0, torch.tensor([1.0, 9.0]), label_smoothing=0.2)(logits, targets).backward()
    assert logits.grad is not None
    # with the weights in the smoothed labels, as in PyTorch's loss, the light class's own images would be pushed away
    assert (logits.grad[targets == 0, 0] < 0).all()
    assert (logits.grad[targets == 1, 1] < 0).all()


def test_without_focus_smoothing_is_that_of_cross_entropy() -> None:
    logits, targets = torch.randn(20, 4), torch.randint(4, (20,))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(FocalLoss(0.0, label_smoothing=0.1)(logits, targets), expected)


def test_losses_by_name() -> None:
    logits, labels = torch.randn(20, 4), torch.randint(2, (20, 4)).float()
    focal = criterion_of(config(multi_label=True, loss="focal"), None, None, 4)
    expected = sigmoid_focal_loss(logits, labels, alpha=-1, gamma=2.0, reduction="mean")
    torch.testing.assert_close(focal(logits, labels), expected)
    bce = criterion_of(config(multi_label=True, loss="bce"), None, None, 4)
    torch.testing.assert_close(bce(logits, labels), F.binary_cross_entropy_with_logits(logits, labels))
    targets = torch.randint(4, (20,))
    single = criterion_of(config(loss="bce", label_smoothing=0.0), None, None, 4)
    one_hot = F.one_hot(targets, 4).float()
    torch.testing.assert_close(single(logits, targets), F.binary_cross_entropy_with_logits(logits, one_hot))


def test_balanced_weights_are_scikit_learns() -> None:
    targets = torch.tensor([0] * 7 + [1] * 2 + [2])
    data = TensorDataset(torch.zeros(10, 1), targets)
    criterion = criterion_of(config(balance="loss"), None, data, 3)
    assert isinstance(criterion, FocalLoss)
    assert criterion.gamma == 0
    assert criterion.weight is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    assert criterion.weight.tolist() == pytest.approx(list(expected))


def test_an_own_loss_trains(digits: NamedData) -> None:
    own, named = network(), network()
    recipe = config(epochs=1)
    finetune(
        own, digits.train, config=recipe, criterion=lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), quiet=True
    )
    finetune(named, digits.train, config=recipe, quiet=True)
    assert same(own.state_dict(), named.state_dict())


@pytest.mark.sweep
def test_a_teacher_is_learned_from_and_left_alone(digits: NamedData) -> None:
    teacher = network(seed=1).train()
    finetune(teacher, digits.train, config=config(epochs=6, lr=3e-3), quiet=True)
    before, modes = copy.deepcopy(teacher.state_dict()), [module.training for module in teacher.modules()]
    # targets that say nothing: whatever is learned is the teacher's
    images = torch.stack([digits.train[at][0] for at in range(256)])
    blank = TensorDataset(images, torch.full((256, 10), 0.1))
    recipe = config(epochs=6, lr=3e-3)
    taught = finetune(network(), blank, config=recipe, teacher=teacher, distillation=(1.0, 4.0), quiet=True).model
    alone = finetune(network(), blank, config=recipe, quiet=True).model
    accuracies = [evaluate(model, digits.val, config=config()).accuracy for model in (taught, alone)]
    assert accuracies[0] > accuracies[1] + 0.2
    assert same(before, teacher.state_dict())
    assert [module.training for module in teacher.modules()] == modes


# Targets and sampling


def test_targets_are_found_without_images() -> None:
    class Folder(Dataset[Any]):
        samples: ClassVar[list[tuple[str, int]]] = [("a.png", 2), ("b.png", 0), ("c.png", 2)]

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("an image was loaded")

    folder = Folder()
    assert targets_of(folder).tolist() == [2, 0, 2]  # type: ignore[union-attr]
    assert targets_of(ConcatDataset([folder, Subset(folder, [1])])).tolist() == [2, 0, 2, 0]  # type: ignore[union-attr]
    assert targets_of(DataLoader(folder)).tolist() == [2, 0, 2]  # type: ignore[union-attr]
    assert class_counts(folder, 4, False)[0].tolist() == [1, 0, 2, 0]
    assert targets_of([(torch.zeros(1), 0)]) is None


def test_balanced_sampling_draws_each_class_equally_often_and_alike_on_resume() -> None:
    data = imbalanced(2000, 0)
    order = Order(data, 50, name="data", train=True, seed=0, rank=0, world=1, weights=image_weights(data))
    batches = list(order)
    drawn = torch.tensor([index for batch in batches for _, index, _ in batch])
    share = data.tensors[1][drawn].float().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 2000)
    order.start = 30
    assert list(order) == batches[30:]


@pytest.mark.parametrize(
    ("changes", "data", "says"),
    [
        ({"balance": "sampling"}, DataLoader(imbalanced(64, 0), 32), "needs a Dataset with indices"),
        ({"balance": "loss"}, [(torch.zeros(8, 1, 1), 0)] * 64, "does not tell its targets"),
        ({"multi_label": True, "loss": "bce"}, imbalanced(64, 0), "vectors of 2 labels"),
        ({}, TensorDataset(torch.zeros(64, 8, 1, 1), torch.zeros(64, 2, dtype=torch.long)), "multi_label=True"),
        ({"multi_label": True, "loss": "bce"}, TensorDataset(torch.zeros(64, 8, 1, 1), torch.full((64, 2), 2)), "0 to 1"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_refused(changes: dict[str, Any], data: Any, says: str) -> None:
    with pytest.raises(RetrofitError, match=says):
        finetune(classifier(8, 2), data, config=RECIPE.replace(**changes), quiet=True)


def test_criteria_and_teachers_that_are_none_are_refused(digits: NamedData) -> None:
    model = network()
    with pytest.raises(TypeError, match="criterion must be a function"):
        finetune(model, digits.train, config=config(), criterion="focal")  # type: ignore[arg-type]
    with pytest.raises(RetrofitError, match="has parameters"):
        finetune(model, digits.train, config=config(), criterion=nn.Bilinear(2, 2, 1))
    with pytest.raises(RetrofitError, match="its own teacher"):
        finetune(model, digits.train, config=config(), teacher=model)
    with pytest.raises(RetrofitError, match="distillation must be"):
        finetune(model, digits.train, config=config(), teacher=network(), distillation=(1.5, 4.0))
    with pytest.raises(RetrofitError, match="know the same classes"):
        finetune(model, digits.train, config=config(), teacher=classifier(3 * 16 * 16, 3), quiet=True)


def test_a_run_with_another_loss_or_teacher_is_not_resumed(digits: NamedData, tmp_path: Path) -> None:
    def own(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    finetune(network(), digits.train, config=config(epochs=1), criterion=own, output_dir=tmp_path, quiet=True)
    for changes in ({}, {"criterion": nn.CrossEntropyLoss()}, {"criterion": own, "teacher": network(seed=2)}):
        with pytest.raises(RetrofitError, match=r"criterion: |teacher: "):
            finetune(
                network(),
                digits.train,
                config=config(epochs=1),
                output_dir=tmp_path,
                resume=True,
                quiet=True,
                **changes,
            )
