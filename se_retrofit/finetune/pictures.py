"""Pictures of what the network sees: a batch before training, and the images with the highest losses after it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError
from ..models import IMAGES
from ..paths import new_figure, save_figure, writable
from ..tables import short
from .config import FinetuneConfig
from .data import name_of
from .engine import placed
from .learning import mixed
from .randomness import UPDATE, seed_all
from .run import Run
from .setup import Job, check, started
from .targets import targets_together
from .transforms import class_names, class_names_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 32  # images of a batch that are drawn
COLUMNS = 8
LETTERS = 26  # per line above an image


def show_batch(model: nn.Module, train_data: Any, file: str | Path, *, config: FinetuneConfig | None = None) -> Path:
    """Draw the first training images as the network will see them, augmented and mixed, with their labels.

    Args:
        model: the network; it is copied and not changed.
        train_data, config: as for ``finetune``.
        file: the picture to write; its suffix determines the format.

    Raises:
        RetrofitError: If the file can't be written, or the data are not images of one or three channels to train on.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit.finetune import load_data, show_batch
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> show_batch(model, load_data("digits").train, f"{tempfile.mkdtemp()}/batch.png").name
        'batch.png'
    """
    writable(file)
    job = Job(model, train_data, None, (config or FinetuneConfig()).replace(patience=None, trackers=()), quiet=True)
    check(job)
    with started(replace(job, model=copy.deepcopy(model))) as run:
        images, labels = placed(next(run.train.batches(0)), run.device)
        if run.learning.mixup is not None:
            seed_all(run.config.seed, UPDATE, run.rank, 0)
            images, labels = mixed(run.learning.mixup, images, labels)
        names = class_names(run.model) or class_names_of(train_data, run.config.keys) or []
        titles = [in_words(label, names) for label in labels[:MOST].cpu()]
        if run.rank == 0:
            save_figure(drawn(list(images[:MOST].cpu()), titles, run.model), file)
    return Path(file)


def draw_hardest(run: Run, file: Path) -> None:
    """Draw the validation images with the highest losses in the best epoch, unless the data are not pictures."""
    row = next((row for row in run.progress.history if row["epoch"] == run.progress.best_epoch), {})
    if run.val is None or not row.get("hardest"):
        return
    names = class_names(run.model) or class_names_of(run.val.data, run.config.keys) or []
    items = run.val.items([entry["image"] for entry in row["hardest"]])
    titles = []
    for entry, (_, target) in zip(row["hardest"], items, strict=True):
        answer = ", ".join(name(number, names) for number in entry["answer"]) or "nothing"
        place = Path(name_of(run.val.data, entry["image"])).name
        titles.append(
            f"{in_words(targets_together([target])[0], names)}\ntaken for {answer}\nloss {entry['loss']:.2f}\n{place}"
        )
    if is_picture(items[0][0]):
        save_figure(drawn([image.cpu() for image, _ in items], titles, run.model), file)


def name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def in_words(label: Tensor, names: Sequence[str]) -> str:
    """Return the name of a class number, or the names of a vector's classes with their shares."""
    if label.dim() == 0:
        return name(int(label), names)
    parts = [
        (number, float(label[number])) for number in label.argsort(descending=True).tolist() if label[number] > 0.05
    ]
    told = [("" if part == 1 else f"{part:.0%} ") + name(number, names) for number, part in parts[:3]]
    return "\n".join(told) or "nothing"


def is_picture(image: Tensor) -> bool:
    return image.dim() == 3 and len(image) in (1, 3)


def drawn(images: Sequence[Tensor], titles: Sequence[str], model: nn.Module) -> Figure:
    """Draw images in rows, with a title above each."""
    if not is_picture(images[0]):
        raise RetrofitError(f"inputs of shape {tuple(images[0].shape)} are not pictures with one or three channels")
    columns = min(len(images), COLUMNS)
    rows = -(-len(images) // columns)
    lines = max(title.count("\n") + 1 for title in titles)
    figure = new_figure(1.7 * columns, (1.75 + 0.16 * lines) * rows)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes in places:
        axes.set(xticks=[], yticks=[], frame_on=False)  # axis("off") would leave no room for the title
    for axes, colors, title in zip(figure.axes, in_colors(images, model), titles, strict=False):
        axes.set_title("\n".join(short(line, LETTERS) for line in title.splitlines()), fontsize=7, parse_math=False)
        axes.imshow(colors.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
    return figure


def in_colors(images: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """Convert prepared images to colours from 0 to 1: undo the normalisation, or scale by the range."""
    settings = vars(model).get(IMAGES)
    if settings is not None:
        mean, std = (torch.tensor(settings[key], device="cpu")[:, None, None] for key in ("mean", "std"))
        return [(image.float() * std + mean).clamp(0, 1) for image in images]
    low = min(float(image.min()) for image in images)
    high = max(float(image.max()) for image in images)
    return [(image.float() - low) / max(high - low, 1e-12) for image in images]
