"""The targets of a data set, read without its images, and the number of images of each class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from ..errors import RetrofitError, brief
from ..fields import label_column


def targets_together(targets: Sequence[Any]) -> Tensor:
    """Stack class numbers to (N,), vectors to (N, classes). A list of one integer, as in some data sets, is a class."""
    with _told(targets):
        together = torch.stack([torch.as_tensor(target) for target in targets])
    if together.dim() == 2 and together.shape[1] == 1 and not together.is_floating_point():
        together = together[:, 0]
    return class_numbers(together)


@contextlib.contextmanager
def _told(targets: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        got = ", ".join(list(dict.fromkeys(map(brief, targets)))[:3])  # those that differ
        raise RetrofitError(f"targets must be class numbers, or vectors of one length, got {got}") from error


def class_numbers(targets: Tensor) -> Tensor:
    """Convert targets (N,) that are whole numbers to integers; leave all others as they are, to be rejected later."""
    if targets.dim() != 1 or targets.is_complex() or (targets.is_floating_point() and bool((targets % 1 != 0).any())):
        return targets
    return targets.long()


def targets_of(data: Any, keys: Sequence[str] = ()) -> Tensor | None:
    """Return the targets of all items, (images,) or (images, classes), if the data set provides them without loading
    images: data sets of torchvision and Hugging Face, ``TensorDataset``, and subsets and concatenations of these.
    """
    if isinstance(data, DataLoader):
        return targets_of(data.dataset, keys)
    if isinstance(data, Subset):
        inner = targets_of(data.dataset, keys)
        return None if inner is None else inner[list(data.indices)]
    if isinstance(data, ConcatDataset):
        parts = [targets_of(part, keys) for part in data.datasets]
        return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])
    if type(data) is TensorDataset and len(data.tensors) > 1:
        return data.tensors[1].cpu()
    # a Hugging Face data set, or the one in timm's reader
    rows = getattr(getattr(data, "reader", None), "dataset", data)
    key, column = label_column(rows, keys), None
    with contextlib.suppress(KeyError):
        column = None if key is None else rows[key]
    column = list(column) if column is not None and not isinstance(column, Tensor) else column
    for values in (column, getattr(data, "targets", None), [entry[1] for entry in _samples(data)]):
        if values is not None and len(values) == len(data):
            if (changed := getattr(data, "target_transform", None)) is not None:
                plain = values.tolist() if isinstance(values, Tensor) else values
                return targets_together([changed(value) for value in plain])
            if isinstance(values, Tensor):
                return values
            with _told(list(values)):
                return torch.as_tensor(list(values))
    return None


def _samples(data: Any) -> list[Any]:
    """Return the ``(file, class)`` pairs of torchvision's folders and timm's readers; empty for other data."""
    samples = getattr(data, "samples", None) or getattr(getattr(data, "reader", None), "samples", None)
    fits = isinstance(samples, list) and samples and isinstance(samples[0], (tuple, list)) and len(samples[0]) > 1
    return samples if fits else []  # type: ignore[return-value]


def class_counts(data: Any, classes: int | None, multi_label: bool, keys: Sequence[str] = ()) -> tuple[Tensor, int]:
    """Return the number of images of each class, (classes,), and in total."""
    targets = targets_of(data, keys)
    if targets is None or targets.dim() != (2 if multi_label else 1):
        kind = "a vector for each image" if multi_label else "one class number for each image"
        raise RetrofitError(
            f"train_data ({type(data).__name__}) does not tell its targets: a balanced run needs a Dataset with "
            f"`targets` or `samples`, {kind}, or a criterion with weights of your own"
        )
    if multi_label:
        return (targets > 0.5).sum(0).float(), len(targets)
    check_counted_from_0(int(targets.min()))
    return torch.bincount(targets.long(), minlength=classes or 0).float(), len(targets)


def check_counted_from_0(lowest: int) -> None:
    """Raise an error if the lowest class number is negative."""
    if lowest < 0:
        raise RetrofitError(
            f"the data has class {lowest}, and classes are counted from 0; leave out images without a label, whose class "
            "is -1 in many data sets"
        )


def image_weights(data: Any, keys: Sequence[str] = ()) -> Tensor:
    """Return for each image the reciprocal of the number of images of its class."""
    counts, _ = class_counts(data, None, False, keys)
    return 1 / counts.double()[targets_of(data, keys).long()]  # type: ignore[union-attr]
