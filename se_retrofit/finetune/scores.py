"""Scores of a classifier beside loss and accuracy: top-5, precision, recall, F1, mAP. They are torchmetrics', of all images
together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import extra

__all__ = ["Answers", "confusion_of", "each_class", "higher_is_better", "scores_of"]


@dataclass(frozen=True)
class Answers:
    """What a network said about each image, on the CPU.

    Attributes:
        loss, accuracy: over all images; of several labels an image, accuracy is the share of labels that are right.
        classes: how many there are.
        multi_label: whether an image may have several.
        said: the classes of each image that are the most likely, the first first, (images, 5), fewer where there are fewer
            classes; with ``multi_label`` the probabilities, (images, classes).
        targets: the classes, (images,); with ``multi_label`` 0 and 1, (images, classes).
    """

    loss: float
    accuracy: float
    classes: int
    multi_label: bool
    said: Tensor
    targets: Tensor

    @property
    def right(self) -> Tensor:
        """Which images are classified correctly (in all labels), (images,)."""
        if self.multi_label:
            return ((self.said > 0.5) == (self.targets > 0.5)).all(1)
        return self.said[:, 0] == self.targets


def scores_of(answers: Answers) -> dict[str, float]:
    """All scores as numbers. Precision, recall and F1 are means over the classes, each class counting the same; a class
    that is neither in the data nor ever answered counts in none."""
    scores = {"val_loss": answers.loss, "val_accuracy": answers.accuracy}
    if not answers.multi_label and answers.classes > 5:
        scores["val_top5"] = float((answers.said == answers.targets[:, None]).any(1).double().mean())
    each = each_class(answers)
    known = (each["images"] + each["answered"]) > 0
    for name in ("precision", "recall", "f1"):
        scores[f"val_{name}"] = float(each[name][known].mean()) if known.any() else 0.0
    if answers.multi_label:
        held = each["average_precision"].nan_to_num()[each["images"] > 0]
        scores["val_map"] = float(held.mean()) if len(held) else 0.0
    return scores


def confusion_of(answers: Answers) -> Tensor:
    """How many images of each class (rows) are taken for each (columns), (classes, classes)."""
    with extra("finetune"):
        from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(answers.said[:, 0], answers.targets, answers.classes, validate_args=False)


def each_class(answers: Answers) -> dict[str, Tensor]:
    """Figures of each class, (classes,): how many images it has and how often it was the answer, precision, recall, F1."""
    with extra("finetune"):
        from torchmetrics.functional import classification as metrics

    said, targets, number = answers.said, answers.targets, answers.classes
    named: tuple[Callable[..., Tensor], ...]
    options: dict[str, Any] = {"average": "none", "validate_args": False}
    if answers.multi_label:
        targets = (targets > 0.5).long()
        stats = metrics.multilabel_stat_scores(said, targets, number, **options)
        named = (metrics.multilabel_precision, metrics.multilabel_recall, metrics.multilabel_f1_score)
    else:
        said = said[:, 0]
        stats = metrics.multiclass_stat_scores(said, targets, number, **options)
        named = (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    stats = stats.reshape(number, -1)  # of a single label torchmetrics gives the figures alone
    each: dict[str, Tensor] = {}
    for at, name in enumerate(("precision", "recall", "f1")):
        each[name] = named[at](said, targets, number, **options).double().reshape(number)
    each["images"], each["answered"] = stats[:, 4], stats[:, 0] + stats[:, 1]
    if answers.multi_label:
        each["average_precision"] = torch.full((number,), torch.nan, dtype=torch.float64)
        held = (each["images"] > 0).nonzero()[:, 0]  # torchmetrics warns of classes that no image has
        for at in held.tolist():
            precision = metrics.binary_average_precision(said[:, at], targets[:, at], validate_args=False)
            each["average_precision"][at] = precision.double()
    return each


def higher_is_better(metric: str) -> bool:
    return metric != "loss"
