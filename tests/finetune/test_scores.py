"""Scores agree with scikit-learn's."""

from __future__ import annotations

import json

import pytest
import sklearn.metrics
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig, evaluate

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
    labels = range(CLASSES)
    each = sklearn.metrics.precision_recall_fscore_support(true, said, labels=labels, zero_division=0.0)
    for at, name in enumerate(("precision", "recall", "f1", "images")):
        assert [getattr(found, name) for found in scores.classes] == pytest.approx(each[at].tolist())
        if name != "images":  # a class that neither is nor is answered has no part in the mean
            assert getattr(scores, name) == pytest.approx(each[at][: CLASSES - 1].mean())
    assert scores.confusion.tolist() == sklearn.metrics.confusion_matrix(true, said, labels=labels).tolist()
    assert scores.right.tolist() == (said == true).tolist()
    assert scores.accuracy == pytest.approx(sklearn.metrics.accuracy_score(true, said))
    top5 = sklearn.metrics.top_k_accuracy_score(true, logits.numpy(), k=5, labels=range(CLASSES))
    assert scores.top5 == pytest.approx(top5)
    assert scores.loss == pytest.approx(
        sklearn.metrics.log_loss(true, logits.double().softmax(1).numpy(), labels=range(CLASSES)), rel=1e-5
    )


def test_scores_of_several_labels_agree_with_scikit_learn() -> None:
    logits, targets = several_labels()
    config = CONFIG.replace(multi_label=True, criterion="bce")
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(Answers(), data, config=config)
    said, true, probable = (logits > 0).long().numpy(), targets.numpy(), logits.sigmoid().numpy()
    assert scores.f1 == pytest.approx(
        sklearn.metrics.f1_score(true, said, average="macro", zero_division=0.0), rel=1e-6
    )
    held = [label for label in range(CLASSES) if true[:, label].any()]
    assert len(held) == CLASSES - 1
    averages = []
    for label in held:  # of each image that has it: the share of those that have it among the images no less probable
        before = probable[:, label] >= probable[true[:, label] == 1, label][:, None]
        averages.append((before * true[:, label]).sum(1) / before.sum(1))
    assert scores.map == pytest.approx(sum(average.mean() for average in averages) / len(held))
    assert scores.accuracy == pytest.approx((said == true).mean())
    assert "average precision" in str(scores)
    assert json.loads(json.dumps(scores.to_dict()))["map"] == scores.map
    with pytest.raises(RetrofitError, match="no class is taken for another"):
        _ = scores.confusion


def test_soft_labels_count_as_their_greatest_class() -> None:
    logits, targets = one_class()
    soft = nn.functional.one_hot(targets, CLASSES) * 0.7 + 0.3 / CLASSES
    hard = evaluate(Answers(), TensorDataset(logits[:, :, None, None], targets), config=CONFIG)
    scores = evaluate(Answers(), TensorDataset(logits[:, :, None, None], soft), config=CONFIG)
    assert scores.f1 == hard.f1
    assert scores.loss > hard.loss
