"""Scores agree with scikit-learn's."""

from __future__ import annotations

import pytest
import sklearn.metrics
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig, evaluate, evaluate_closely

CLASSES = 7
CONFIG = FinetuneConfig(cpu=True, batch_size=16)


class Answers(nn.Module):
    """Images are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.scale


def one_class(images: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES - 2, (images,), generator=generator)  # the last two classes have no image
    logits = torch.randn(images, CLASSES, generator=generator)
    logits[torch.arange(images), targets] += 1.0
    logits[:, CLASSES - 1] -= 100.0  # and the last is never answered
    return logits, targets


def several_labels(images: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    targets = (torch.rand(images, CLASSES, generator=generator) < torch.linspace(0.05, 0.6, CLASSES)).long()
    targets[:, 2] = 0  # a label that no image has
    return torch.randn(images, CLASSES, generator=generator) + targets, targets


@pytest.mark.parametrize("loader", [False, True])
def test_scores_of_classes_agree_with_scikit_learn(loader: bool) -> None:
    logits, targets = one_class()
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(Answers(), DataLoader(data, 7) if loader else data, config=CONFIG)
    said, true = logits.argmax(1).numpy(), targets.numpy()
    for name, score in (
        ("precision", sklearn.metrics.precision_score),
        ("recall", sklearn.metrics.recall_score),
        ("f1", sklearn.metrics.f1_score),
    ):
        assert scores[f"val_{name}"] == pytest.approx(score(true, said, average="macro", zero_division=0.0), rel=1e-6)
    assert scores["val_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, said))
    top5 = sklearn.metrics.top_k_accuracy_score(true, logits.numpy(), k=5, labels=range(CLASSES))
    assert scores["val_top5"] == pytest.approx(top5)
    assert scores["val_loss"] == pytest.approx(
        sklearn.metrics.log_loss(true, logits.double().softmax(1).numpy(), labels=range(CLASSES)), rel=1e-5
    )


def test_scores_of_several_labels_agree_with_scikit_learn() -> None:
    logits, targets = several_labels()
    config = CONFIG.replace(multi_label=True, criterion="bce")
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(Answers(), data, config=config)
    said, true, probable = (logits > 0).long().numpy(), targets.numpy(), logits.sigmoid().numpy()
    assert scores["val_f1"] == pytest.approx(
        sklearn.metrics.f1_score(true, said, average="macro", zero_division=0.0), rel=1e-6
    )
    held = [label for label in range(CLASSES) if true[:, label].any()]
    assert len(held) == CLASSES - 1
    average = sklearn.metrics.average_precision_score(true[:, held], probable[:, held], average="macro")
    assert scores["val_map"] == pytest.approx(average, rel=1e-5)
    assert scores["val_accuracy"] == pytest.approx((said == true).mean())
    with pytest.raises(RetrofitError, match="evaluate_closely is for one class an image"):
        evaluate_closely(Answers(), data, config=config)


def test_soft_labels_count_as_their_greatest_class() -> None:
    logits, targets = one_class()
    soft = nn.functional.one_hot(targets, CLASSES) * 0.7 + 0.3 / CLASSES
    hard = evaluate(Answers(), TensorDataset(logits[:, :, None, None], targets), config=CONFIG)
    scores = evaluate(Answers(), TensorDataset(logits[:, :, None, None], soft), config=CONFIG)
    assert scores["val_f1"] == hard["val_f1"]
    assert scores["val_loss"] > hard["val_loss"]
