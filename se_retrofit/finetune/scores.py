"""Scores of a classifier beside loss and accuracy: top-5, precision, recall, F1, mAP, each class, the confusion matrix.

They are torchmetrics', of all images together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RetrofitError, extra

__all__ = ["Answers", "ClassReport", "class_report_of", "higher_is_better", "scores_of"]


@dataclass(frozen=True)
class Answers:
    """What a network said about each image, on the CPU.

    Attributes:
        loss, accuracy: over all images; of several labels an image, accuracy is the share of labels that are right.
        classes: how many there are.
        multi_label: whether an image may have several.
        said: the class of each image, (images,); with ``multi_label`` the probabilities, (images, classes).
        targets: the classes, (images,); with ``multi_label`` 0 and 1, (images, classes).
        top5: whether the class is among the five most probable ones, (images,); None with fewer than six classes.
    """

    loss: float
    accuracy: float
    classes: int
    multi_label: bool
    said: Tensor
    targets: Tensor
    top5: Tensor | None

    @property
    def right(self) -> Tensor:
        """Which images are classified correctly (in all labels), (images,)."""
        if self.multi_label:
            return ((self.said > 0.5) == (self.targets > 0.5)).all(1)
        return self.said == self.targets


@dataclass(frozen=True)
class ClassReport:
    """How well each class is recognised.

    Attributes:
        scores: as ``evaluate`` returns them.
        classes: for each class ``class`` (its name or number), ``images``, ``precision``, ``recall`` and ``f1``; with
            several labels an image also ``average_precision``, None for a class that no image has.
        confusion: how often (row) a class was taken for (column) another, (classes, classes); with several labels an
            image a matrix ``[[true negatives, false positives], [false negatives, true positives]]`` for each,
            (classes, 2, 2).
    """

    scores: dict[str, float]
    classes: list[dict[str, Any]]
    confusion: Tensor

    def __str__(self) -> str:
        names = list(self.classes[0])
        cells = [[_cell(row[name]) for name in names] for row in self.classes]
        widths = [max(len(name), *(len(row[at]) for row in cells)) for at, name in enumerate(names)]
        lines = [names, *cells]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def scores_of(answers: Answers) -> dict[str, float]:
    """All scores as numbers. Precision, recall and F1 are means over the classes, each class counting the same; a class
    that is neither in the data nor ever answered counts in none."""
    scores = {"val_loss": answers.loss, "val_accuracy": answers.accuracy}
    if answers.top5 is not None:
        scores["val_top5"] = float(answers.top5.double().mean())
    each = _each_class(answers)
    known = (each["images"] + each["answered"]) > 0
    for name in ("precision", "recall", "f1"):
        scores[f"val_{name}"] = float(each[name][known].mean()) if known.any() else 0.0
    if answers.multi_label:
        scores["val_map"] = float(each["average_precision"].nan_to_num()[each["images"] > 0].mean())
    return scores


def class_report_of(answers: Answers, names: Sequence[str] | None = None) -> ClassReport:
    if names is not None and len(names) != answers.classes:
        raise RetrofitError(f"{len(names)} names of classes for a network of {answers.classes} classes")
    each = _each_class(answers)
    columns = ["precision", "recall", "f1", *(["average_precision"] if answers.multi_label else [])]
    rows = []
    for number in range(answers.classes):
        row: dict[str, Any] = {
            "class": number if names is None else names[number], "images": int(each["images"][number]),
        }  # fmt: skip
        row.update({name: float(each[name][number]) for name in columns})
        if answers.multi_label and row["images"] == 0:
            row["average_precision"] = None
        rows.append(row)
    return ClassReport(scores_of(answers), rows, _confusion(answers))


def _each_class(answers: Answers) -> dict[str, Tensor]:
    """Figures of each class, (classes,)."""
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
        stats = metrics.multiclass_stat_scores(said, targets, number, **options)
        named = (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    each: dict[str, Tensor] = {
        name: metric(said, targets, number, **options).double()
        for name, metric in zip(("precision", "recall", "f1"), named, strict=True)
    }
    each["images"], each["answered"] = stats[:, 4], stats[:, 0] + stats[:, 1]
    if answers.multi_label:
        each["average_precision"] = torch.full((number,), torch.nan, dtype=torch.float64)
        held = (each["images"] > 0).nonzero()[:, 0]  # torchmetrics warns of classes that no image has
        for at in held.tolist():
            precision = metrics.binary_average_precision(said[:, at], targets[:, at], validate_args=False)
            each["average_precision"][at] = precision.double()
    return each


def _confusion(answers: Answers) -> Tensor:
    from torchmetrics.functional import classification as metrics

    if answers.multi_label:
        targets = (answers.targets > 0.5).long()
        return metrics.multilabel_confusion_matrix(answers.said, targets, answers.classes, validate_args=False)
    return metrics.multiclass_confusion_matrix(answers.said, answers.targets, answers.classes, validate_args=False)


def higher_is_better(metric: str) -> bool:
    return metric != "loss"
