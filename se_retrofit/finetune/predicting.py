"""Prediction of the classes of images without labels."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from ..batches import as_taken_by
from ..errors import RetrofitError, check_positive
from ..surgery.record.copying import in_mode, modes_kept
from .data import UNREADABLE
from .engine import called
from .folders import files_in
from .transforms import class_names, has_several_labels, load_image, transform_of


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image, with their probabilities; classes without names are numbers as text. If the
    image can't be read, there are no classes, and ``error`` says why."""

    file: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def predict(
    model: nn.Module,
    images: Iterable[str | Path] | str | Path,
    *,
    top: int = 1,
    batch_size: int = 64,
    bad_images: Literal["error", "skip"] = "error",
) -> Iterator[Prediction]:
    """Classify image files with a network that ``finetune`` trained on images, prepared as in its validation.

    After training with ``multi_label``, each class has an independent probability.

    Args:
        model: the network; it runs on its own device in eval mode, and its training flags are restored afterwards.
        images: image files, and folders, which stand for all images in them; or a single one.
        top: number of classes to return for each image.
        batch_size: number of images per batch.
        bad_images: ``"skip"`` to continue after an image that can't be read; its ``Prediction`` says why in ``error``.

    Yields:
        One ``Prediction`` for each image, in the given order; within a folder, sorted by name.

    Raises:
        RetrofitError: If a file is missing or, unless skipped, can't be read; if it is unknown how the network's images
            are prepared; or if ``top`` or ``batch_size`` is below 1.
    """
    check_positive("top", top)
    check_positive("batch_size", batch_size)
    transform, names = transform_of(model), class_names(model) or []
    files = list(_files([images] if isinstance(images, (str, Path)) else images))
    for start in range(0, len(files), batch_size):
        read = [(file, _read(file, transform)) for file in files[start : start + batch_size]]
        tensors = [image for _, image in read if isinstance(image, Tensor)]
        answers = _answers(model, torch.stack(tensors), top) if tensors else iter(())
        for file, image in read:
            if isinstance(image, str):
                if bad_images == "error":
                    raise RetrofitError(f'{image}; bad_images="skip" continues without it')
                yield Prediction(str(file), error=image)
                continue
            best, numbers = next(answers)
            yield Prediction(str(file), tuple(names[n] if n < len(names) else str(n) for n in numbers), tuple(best))


def _answers(model: nn.Module, batch: Tensor, top: int) -> Iterator[tuple[list[float], list[int]]]:
    """Yield the probabilities and the numbers of the most likely classes of each image."""
    with modes_kept(model), torch.no_grad():
        logits, _ = called(in_mode(model, False), as_taken_by(batch, model))
        shares = logits.float().sigmoid() if has_several_labels(model) else logits.float().softmax(1)
    values, indices = shares.topk(min(top, shares.shape[1]), dim=1)
    return zip(values.tolist(), indices.tolist(), strict=True)


def _files(images: Iterable[str | Path]) -> Iterator[Path]:
    for given in map(Path, images):
        if given.is_dir():
            found = sorted(Path(file) for file in files_in(given) if is_image_file(file))
            if not found:
                raise RetrofitError(f"{given} holds no images ({', '.join(IMG_EXTENSIONS)})")
            yield from found
        elif given.is_file():
            yield given
        else:
            raise RetrofitError(f"no file or folder {given}")


def _read(file: Path, transform: Any) -> Tensor | str:
    """Return the prepared image, or the reason why it can't be read."""
    try:
        return transform(load_image(file))
    except UNREADABLE as error:
        return f"{file} can't be read as an image: {error}"


def write_predictions(predictions: Iterable[Prediction], file: Any, top: int = 1) -> list[str]:
    """Write the likeliest classes of each file and their probabilities as CSV; return the errors."""
    writer = csv.writer(file, lineterminator="\n")
    numbers = [""] if top == 1 else [f"_{number + 1}" for number in range(top)]
    header = ["file", *(f"{field}{number}" for number in numbers for field in ("class", "probability"))]
    errors = []
    for found in predictions:
        if found.error:
            errors.append(found.error)
            continue
        if header:  # not before the first prediction, which may raise an error
            writer.writerow(header)
            header = []
        cells = zip(found.classes, found.probabilities, strict=True)
        writer.writerow([found.file, *(cell for name, share in cells for cell in (name, f"{share:.6f}"))])
    return errors
