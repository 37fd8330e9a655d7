"""A closer look at a classifier than one number, and its use on images that have no labels."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import RetrofitError
from ..models import Base
from ..saving.atomic import replaced_file
from ..surgery.record.copying import in_mode
from ..tables import aligned
from .config import FinetuneConfig
from .data import UNREADABLE
from .engine import called
from .metrics import answers
from .parts import as_found
from .scores import confusion_of, each_class, scores_of
from .splits import opened
from .transforms import class_names, class_names_of, has_several_labels, transform_of

__all__ = ["ClassScores", "Evaluation", "Prediction", "evaluate_closely", "predict", "write_predictions"]


@dataclass(frozen=True)
class ClassScores:
    """One class: how many of its images there are, and precision, recall and F1, 0 where undefined."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """What a classifier does on a data set.

    Attributes:
        images: how many there are.
        loss: cross-entropy, the mean over the images.
        accuracy: the share that is classified correctly.
        top5: the share whose class is among the five most likely ones; None with five classes or fewer.
        macro_f1: the mean F1 over the classes that have images or were an answer, as ``evaluate`` gives it.
        classes: each class that the network knows.
        confusion: (classes, classes), counts; rows are the true classes, columns the predicted ones.
        split, about: which images of which data they are; empty where the data was not given by name.
    """

    images: int
    loss: float
    accuracy: float
    top5: float | None
    macro_f1: float
    classes: tuple[ClassScores, ...]
    confusion: Tensor
    split: str = ""
    about: str = ""

    def __str__(self) -> str:
        rows = [("class", "images", "precision", "recall", "F1")]
        rows += [
            (c.name, f"{c.images:,}", f"{c.precision:.2%}", f"{c.recall:.2%}", f"{c.f1:.2%}") for c in self.classes
        ]
        lines = [*([self.about] if self.about else []), *aligned(rows, left=1, rule=True)]
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        lines.append(
            f"{self.images:,} images: accuracy {self.accuracy:.2%}{top5}, mean F1 {self.macro_f1:.2%}, loss {self.loss:.4f}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "images": self.images, "loss": self.loss, "accuracy": self.accuracy, "top5": self.top5,
            "macro_f1": self.macro_f1, "classes": [vars(scores) for scores in self.classes],
            "confusion": self.confusion.tolist(), "split": self.split, "about": self.about,
        }  # fmt: skip

    def plot(self, file: str | Path) -> Path:
        """The confusion matrix as a picture, each row as parts of its class's images.

        Raises:
            RetrofitError: the file can't be written.
        """
        from matplotlib.figure import Figure

        shares = self.confusion / self.confusion.sum(1, keepdim=True).clamp(min=1)
        size = len(self.classes)
        side = min(max(3.5, 0.38 * size + 1.5), 30.0)
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="part of the class's images", shrink=0.8)
        if size <= 60:  # beyond that no name can be read
            names = [scores.name for scores in self.classes]
            axes.set_xticks(range(size), names, rotation=90)
            axes.set_yticks(range(size), names)
        if size <= 20:
            for row, column in self.confusion.nonzero().tolist():
                colour = "white" if shares[row, column] > 0.5 else "black"
                count = str(int(self.confusion[row, column]))
                axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        with replaced_file(Path(file)) as fresh:
            figure.savefig(fresh, dpi=120)
        return Path(file)


def evaluate_closely(
    model: nn.Module,
    data: Any,
    *,
    split: str | None = None,
    config: FinetuneConfig | None = None,
    base: Base | None = None,
) -> Evaluation:
    """Accuracy, and for each class precision, recall, F1 and what it is taken for.

    Args and errors: as ``evaluate``.

    Example:
        >>> import timm
        >>> from se_retrofit.finetune import evaluate_closely, load_data
        >>> data = load_data("digits", image_size=16)
        >>> found = evaluate_closely(timm.create_model("resnet10t", num_classes=10), data.val)
        >>> found.images, len(found.classes), found.confusion.shape
        (360, 10, torch.Size([10, 10]))
    """
    if config is not None and config.multi_label:
        raise RetrofitError(
            "evaluate_closely is for one class an image; with multi_label=True evaluate gives precision, recall, F1 and mAP"
        )
    config = FinetuneConfig() if config is None else config
    part = opened(data, split, model, config)
    found = answers(model, part.data, config=config, base=base)
    names = class_names(model) or class_names_of(part.data) or []
    names = [*names, *(str(number) for number in range(len(names), found.classes))]  # a head for more classes
    each, scores = each_class(found), scores_of(found)
    figures = zip(names, *(each[name].tolist() for name in ("images", "precision", "recall", "f1")), strict=False)
    return Evaluation(
        images=len(found.targets),
        loss=found.loss,
        accuracy=found.accuracy,
        top5=scores.get("val_top5"),
        macro_f1=scores["val_f1"],
        classes=tuple(ClassScores(*figure) for figure in figures),
        confusion=confusion_of(found),
        split=part.name,
        about=part.about,
    )


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image, with their probabilities; classes without names are numbers as text."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    model: nn.Module, images: Iterable[str | Path], *, top: int = 1, batch_size: int = 64
) -> Iterator[Prediction]:
    """Classify image files by a network that ``finetune`` trained on images, prepared as in its validation.

    After training with ``multi_label`` each class has a probability of its own.

    Args:
        model: the network; it runs in eval mode where it is, and is left as it was.
        images: files, and folders, which stand for all images in them.
        top: how many classes of each image are told.
        batch_size: images that run together.

    Yields:
        One ``Prediction`` for each image, in the order given; within a folder, sorted by name.

    Raises:
        RetrofitError: a file is missing or is no image; the network does not tell how its images are prepared; ``top`` or
            ``batch_size`` is below 1.
    """
    if top < 1 or batch_size < 1:
        raise RetrofitError(f"top and batch_size must be at least 1, got {top} and {batch_size}")
    transform, names = transform_of(model), class_names(model)
    files = list(_files(images))
    device = next(model.parameters()).device
    for start in range(0, len(files), batch_size):
        chosen = files[start : start + batch_size]
        batch = torch.stack([_read(file, transform) for file in chosen]).to(device)
        with as_found(model), torch.no_grad():
            logits, _ = called(in_mode(model, False), batch)
            shares = logits.float().sigmoid() if has_several_labels(model) else logits.float().softmax(1)
        values, indices = shares.topk(min(top, shares.shape[1]), dim=1)
        for file, best, numbers in zip(chosen, values.tolist(), indices.tolist(), strict=True):
            yield Prediction(str(file), tuple(names[n] if names else str(n) for n in numbers), tuple(best))


def _files(images: Iterable[str | Path]) -> Iterator[Path]:
    for given in map(Path, images):
        if given.is_dir():
            found = sorted(file for file in given.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                raise RetrofitError(f"{given} holds no images ({', '.join(IMG_EXTENSIONS)})")
            yield from found
        elif given.is_file():
            yield given
        else:
            raise RetrofitError(f"no file or folder {given}")


def _read(file: Path, transform: Any) -> Tensor:
    try:
        with Image.open(file) as image:
            tensor: Tensor = transform(image)
    except UNREADABLE as error:
        raise RetrofitError(f"{file} can't be read as an image: {error}") from error
    return tensor


def write_predictions(predictions: Iterable[Prediction], file: Any, top: int = 1) -> None:
    """Predictions as CSV: the file, and for each of the most likely classes its name and probability."""
    writer = csv.writer(file, lineterminator="\n")
    numbers = [""] if top == 1 else [f"_{number + 1}" for number in range(top)]
    header = ["file", *(f"{field}{number}" for number in numbers for field in ("class", "probability"))]
    for found in predictions:
        if header:  # not before the first answer, which may be an error
            writer.writerow(header)
            header = []
        cells = zip(found.classes, found.probabilities, strict=True)
        writer.writerow([found.file, *(cell for name, share in cells for cell in (name, f"{share:.6f}"))])
