"""Scores of a classifier on a data set. Each image counts once, whatever the number of processes."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..batches import as_taken_by
from ..errors import RetrofitError
from ..paths import as_written, new_figure, save_figure
from ..tables import aligned, counted, short
from .config import FinetuneConfig
from .data import Batch, Stream
from .engine import called, engine, gpu_of, in_any, placed
from .log import Log
from .parts import as_found, check_network, to_device
from .randomness import kept_randomness
from .setup import batches_of, check_config
from .targets import check_counted_from_0
from .transforms import check_classes, class_names, class_names_of

MOST_LIKELY = 5  # classes of each image that are kept
LONGEST_NAME = 32  # letters, in the plot of the confusion matrix
TOGETHER = 10  # batches after which several processes agree whether to stop, which takes time
HARDEST = 16  # images with the highest losses, of which a run draws a picture


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class: its number of images and of answers; precision, recall and F1, which are 0 if undefined;
    and, with several labels per image, the average precision, which is None if no image has the label."""

    name: str
    images: int
    answered: int
    precision: float
    recall: float
    f1: float
    average_precision: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The results of a classifier on a data set.

    Attributes:
        loss: mean cross-entropy over the images; binary cross-entropy with several labels per image.
        accuracy: fraction of the images that are classified correctly; with several labels per image, of the labels.
        classes: the scores of each class that the network knows.
        multi_label: whether an image may have several classes.
        answers: the most likely classes of each image, most likely first, (images, 5), or fewer if there are fewer
            classes; with several labels, the probabilities, (images, classes).
        targets: the classes, (images,); with several labels, zeros and ones, (images, classes).
        losses: the loss of each image, (images,).
        places: the index of each image in the data, (images,), because several processes evaluate a part each.
    """

    loss: float
    accuracy: float
    classes: tuple[ClassScores, ...]
    multi_label: bool
    answers: Tensor = field(repr=False, compare=False)
    targets: Tensor = field(repr=False, compare=False)
    losses: Tensor = field(repr=False, compare=False)
    places: Tensor = field(repr=False, compare=False)

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.targets)

    @property
    def right(self) -> Tensor:
        """Which images are classified correctly (in all labels), (images,)."""
        if self.multi_label:
            return ((self.answers > 0.5) == (self.targets > 0.5)).all(1)
        return self.answers[:, 0] == self.targets

    @property
    def top5(self) -> float | None:
        """Fraction of images whose class is among the top five; None with five classes or fewer, or several labels."""
        if self.multi_label or len(self.classes) <= MOST_LIKELY:
            return None
        return float((self.answers == self.targets[:, None]).any(1).double().mean())

    @property
    def precision(self) -> float:
        """Precision, as the unweighted mean over the classes that have images or were an answer."""
        return self._mean("precision")

    @property
    def recall(self) -> float:
        """Recall, averaged like ``precision``."""
        return self._mean("recall")

    @property
    def f1(self) -> float:
        """F1, averaged like ``precision``."""
        return self._mean("f1")

    def _mean(self, name: str) -> float:
        known = [getattr(scores, name) for scores in self.classes if scores.images + scores.answered]
        return statistics.fmean(known) if known else 0.0

    @property
    def map(self) -> float | None:
        """Mean average precision of the labels that occur; None with one class per image."""
        held = [scores.average_precision for scores in self.classes if scores.average_precision is not None]
        return (statistics.fmean(held) if held else 0.0) if self.multi_label else None

    @property
    def confusion(self) -> Tensor:
        """Number of images of each class (rows) that are taken for each class (columns), (classes, classes).

        Raises:
            RetrofitError: If an image may have several classes.
        """
        if self.multi_label:
            raise RetrofitError("with several labels per image, there is no confusion matrix; see classes")
        count = len(self.classes)
        return torch.bincount(self.targets * count + self.answers[:, 0], minlength=count**2).view(count, count)

    def hardest(self) -> list[dict[str, Any]]:
        """Return the images with the highest losses, highest first, as plain data: ``image``, its index in the data,
        ``loss``, and ``answer``, the classes predicted for it."""
        losses, order = self.losses.topk(min(HARDEST, self.images))
        said = (
            [row.nonzero().flatten() for row in self.answers[order] > 0.5]
            if self.multi_label
            else self.answers[order, :1]
        )
        return [
            {"image": int(self.places[at]), "loss": float(loss), "answer": answer.tolist()}
            for at, loss, answer in zip(order, losses, said, strict=True)
        ]

    def scores(self) -> dict[str, float]:
        """Return all scores that are single numbers, such as ``accuracy`` and ``f1``."""
        names = ("loss", "accuracy", "top5", "precision", "recall", "f1", "map")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        extra = ("average precision",) if self.multi_label else ()
        rows = [("class", "images", "precision", "recall", "F1", *extra)]
        for c in self.classes:
            shares = [c.precision, c.recall, c.f1, *([c.average_precision] if self.multi_label else [])]
            rows.append((c.name, f"{c.images:,}", *("" if share is None else f"{share:.2%}" for share in shares)))
        more = {"top-5": self.top5, "mAP": self.map, "mean F1": self.f1}
        shown = "".join(f", {name} {value:.2%}" for name, value in more.items() if value is not None)
        last = f"{counted(self.images, 'image')}: accuracy {self.accuracy:.2%}{shown}, loss {self.loss:.4f}"
        return "\n".join([*aligned(rows, left=1, rule=True), last])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {
            **self.scores(), "images": self.images, "classes": [vars(scores) for scores in self.classes],
            "confusion": None if self.multi_label else self.confusion.tolist(),
        }  # fmt: skip

    def plot(self, file: str | Path) -> Path:
        """Plot the confusion matrix, each row as fractions of its class's images.

        Raises:
            RetrofitError: If the file can't be written, or an image may have several classes.
        """
        from sklearn.metrics import ConfusionMatrixDisplay

        confusion, size = self.confusion, len(self.classes)
        shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
        # with more than 60, the names would be illegible
        names = [as_written(short(scores.name, LONGEST_NAME)) for scores in self.classes] if size <= 60 else None
        side = min(max(2.2, 0.38 * size), 30.0) + 0.8
        room = 0.085 * max(map(len, names or [""]))  # inches, for names beside the matrix and below it
        figure = new_figure(side + room + 0.8, side + room)
        ConfusionMatrixDisplay(shares.numpy(), display_labels=names).plot(
            include_values=size <= 20, cmap="Blues", values_format=".0%", ax=figure.subplots(),
            xticks_rotation="vertical", im_kw={"vmin": 0, "vmax": 1},
        )  # fmt: skip
        return save_figure(figure, file)


def evaluate(model: nn.Module, data: Any, *, config: FinetuneConfig | None = None) -> Evaluation:
    """Evaluate a classifier on images: loss, accuracy and further scores, as measured during a fine-tune.

    Args:
        model: the network; on a GPU, it runs there; otherwise it is moved to the device that it runs on, and stays there.
        data: a Dataset or a DataLoader, as for ``finetune``, such as ``load_split("pictures", "test").data``.
        config: provides batch size, image size, precision, ``multi_label`` and so on.

    Raises:
        RetrofitError: If data and network don't fit together.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import timm
        >>> from se_retrofit.finetune import evaluate, load_data
        >>> data = load_data("digits", image_size=16)
        >>> found = evaluate(timm.create_model("resnet10t", num_classes=10), data.val)
        >>> found.images, len(found.classes), found.confusion.shape
        (360, 10, torch.Size([10, 10]))
    """
    config = FinetuneConfig() if config is None else config
    check_network(model)
    check_config(config)
    check_classes(model, data, config.keys)
    with as_found(model), kept_randomness(), gpu_of(model, config), engine(config) as accelerator:
        to_device(model, accelerator.device)
        names = class_names(model) or class_names_of(data, config.keys) or []
        with closing(batches_of("data", data, model, config, accelerator)) as batches:
            found = measure(model, batches, accelerator, config.multi_label, Log(None, accelerator), names)
    assert found is not None  # only ``stop`` ends it early
    return found


@torch.no_grad()
def measure(
    network: nn.Module,
    data: Stream,
    accelerator: Accelerator,
    multi_label: bool,
    log: Log,
    names: Sequence[str] = (),
    stop: threading.Event | None = None,
) -> Evaluation | None:
    """Evaluate a network on the images of all processes; each image counts once.

    Returns None if ``stop`` is set meanwhile, in any process.
    """
    network.eval()
    device = accelerator.device
    totals = torch.zeros(3, dtype=torch.float32, device=device)
    said: list[tuple[Tensor, ...]] = []
    classes = 0
    every = 1 if accelerator.num_processes == 1 else TOGETHER
    for number, batch in enumerate(data.batches(0)):
        if stop is not None and number % every == 0 and in_any(accelerator, stop.is_set()):
            return None
        log.complain(batch)
        images, targets = placed(batch, device)
        with accelerator.autocast():
            logits, _ = called(network, as_taken_by(images, network))
        classes = logits.shape[1]
        check_targets(batch, classes, multi_label)
        counts = batch.counts.to(device, non_blocking=True)
        losses = losses_of(logits.float(), targets, multi_label)
        right = hits(logits, targets, multi_label) * counts
        # Not losses[counts]: the host would have to wait for its size
        totals += torch.stack([losses.where(counts, losses.new_zeros(())).sum(), right.sum(), counts.sum()])
        said.append((counts, losses, *answer(logits.float(), targets, multi_label)))
    loss, right_count, seen = accelerator.reduce(totals, "sum").tolist()
    counts, *kept = (gathered(list(part), accelerator) for part in zip(*said, strict=True))
    losses, answers, targets, places = (part[counts] for part in (*kept, data.places(len(counts))))
    each = scores_by_class(answers, targets, classes, multi_label, names)
    return Evaluation(
        loss / max(seen, 1), right_count / max(seen, 1), each, multi_label, answers, targets, losses, places
    )


def scores_by_class(
    answers: Tensor, targets: Tensor, classes: int, multi_label: bool, names: Sequence[str]
) -> tuple[ClassScores, ...]:
    """Return the scores of each class; a class without a name is named by its number."""
    said, true = (answers > 0.5, targets > 0.5) if multi_label else (answers[:, 0], targets)
    if multi_label:
        counts = [part.sum(0) for part in (said & true, said, true)]
    else:
        counts = [torch.bincount(part, minlength=classes) for part in (said[said == true], said, true)]
    found = []
    for number, (hit, answered, images) in enumerate(zip(*(count.tolist() for count in counts), strict=True)):
        average = None
        if multi_label and images:
            from sklearn.metrics import average_precision_score

            average = float(average_precision_score(true[:, number], answers[:, number]))
        found.append(
            ClassScores(
                names[number] if number < len(names) else str(number),
                images,
                answered,
                precision=hit / max(answered, 1),
                recall=hit / max(images, 1),
                f1=2 * hit / max(answered + images, 1),
                average_precision=average,
            )
        )
    return tuple(found)


def losses_of(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Return the loss of each image, (N,)."""
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, targets, reduction="none")


def hits(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Return whether the class of each image is right, or the fraction of its labels that are, (N,)."""
    if multi_label:
        return ((logits > 0) == (targets > 0.5)).float().mean(1)
    return logits.argmax(1) == (targets if targets.dim() == 1 else targets.argmax(1))


def answer(logits: Tensor, targets: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Return what is kept for each image: little, because there may be many images and classes."""
    if multi_label:
        return logits.sigmoid(), targets
    likely = logits.topk(min(MOST_LIKELY, logits.shape[1]), dim=1).indices
    likely[:, 0] = logits.argmax(1)  # among ties, the first must not depend on the number that topk returns
    return likely, targets if targets.dim() == 1 else targets.argmax(1)


def gathered(parts: list[Tensor], accelerator: Accelerator) -> Tensor:
    """Gather the values of all processes on the CPU, padded with zeros (which don't count) if their numbers differ."""
    whole = torch.cat(parts)
    if accelerator.num_processes > 1:
        whole = accelerator.gather(accelerator.pad_across_processes(whole))
    return whole.cpu()


def check_targets(batch: Batch, classes: int, multi_label: bool = False) -> None:
    """Check targets on the CPU, because the same mistake in a CUDA kernel would end the process."""
    targets = batch.targets
    got = f"{targets.dtype} of shape {tuple(targets.shape)}"
    if multi_label or (targets.dim() == 2 and targets.is_floating_point()):
        if tuple(targets.shape) != (len(batch.images), classes) or targets.is_complex():
            raise RetrofitError(f"targets must be vectors of {classes} labels, one for each class, got {got}")
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise RetrofitError(
                f"the labels of an image must be from 0 to 1, got {targets.min():g} to {targets.max():g}; finetune is for classifiers"
            )
        return
    if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex():
        hint = "; vectors are for several labels per image (multi_label=True) or, as floats, for soft labels"
        hint = hint if targets.dim() == 2 else ""
        raise RetrofitError(f"targets must be class numbers, got {got}{hint}")
    low, high = int(targets.min()), int(targets.max())
    check_counted_from_0(low)
    if high >= classes:
        raise RetrofitError(
            f"the data has class {high}, and the network has classes 0 to {classes - 1}; a fine-tune with "
            f"num_classes={high + 1} gives it a new head"
        )
