"""Data by name: for training and validation, and the split that is evaluated."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from ..errors import RetrofitError, check_positive
from .experiment import describe_data, plain
from .folders import (
    Subfolder,
    check_several,
    class_folders,
    class_sizes,
    held_out,
    images_in,
    left_out,
    numbers,
    readable,
    split_folders,
)
from .targets import targets_of
from .transforms import class_names_of

TIMM_PREFIXES = ("torch/", "hfds/")


@dataclass(frozen=True)
class NamedData:
    """Training and validation data, and the number of classes (None if the data doesn't provide it).

    ``note`` reports, in one line each, how many images of each class a folder has, how it was split, and which files
    were left out; it may be empty.
    """

    train: Any
    val: Any
    num_classes: int | None
    note: str = ""


@dataclass(frozen=True)
class Split:
    """Images to evaluate a network on.

    Attributes:
        data: a Dataset for ``evaluate``.
        name: ``"train"``, ``"val"``, ``"test"`` or ``"all"``.
        about: which images these are, and how many.
        unseen: the split to evaluate instead to get images that no run trained on; None if there is no other.
        training: for ``"all"``, those of the images that ``finetune`` trains on; None if there are none.
    """

    data: Any
    name: str
    about: str
    unseen: str | None = None
    training: Any = None


def load_data(
    name: str | Path,
    *,
    root: str | Path = "data",
    download: bool = False,
    image_size: int | None = None,
    val_fraction: float = 0.2,
) -> NamedData:
    """Open training and validation data for ``finetune`` by name.

    Args:
        name: ``digits`` (the 1,797 handwritten digits that come with scikit-learn); a folder that holds
            ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, or only ``CLASS/IMAGE``, which is split; or a name for timm's
            dataset factory: ``torch/cifar10``, ``hfds/OWNER/NAME``, ...
        root: where timm's factory stores its data.
        download: whether the factory may download missing data.
        image_size: size of the digits, 32 by default. Other data gets the network's own size, or ``config.image_size``.
        val_fraction: the fraction of each class that is held out if a folder is split; always the same images.

    Raises:
        RetrofitError: If there is no such data, or a class has too few images to be split.

    Example:
        >>> from se_retrofit.finetune import load_data
        >>> data = load_data("digits", image_size=16)
        >>> len(data.train), len(data.val), data.num_classes
        (1437, 360, 10)
    """
    if str(name) == "digits":
        digits = _digits(image_size)
        return NamedData(digits[0], digits[1], 10)
    if is_of_timm(name):
        train, val = (_of_timm(str(name), split, root, download) for split in ("train", "val"))
        names = class_names_of(train)
        return NamedData(train, val, len(names) if names else None)
    folder = data_folder(name)
    with readable(folder):
        parts, found = split_folders(folder), class_folders(folder)
        kept = parts.get("val", parts.get("test"))
        if "train" in parts and kept is not None:
            images = images_in(parts["train"])
            notes = (class_sizes(images), *map(left_out, (parts["train"], kept)))
            return NamedData(images, Subfolder(kept, images.class_to_idx), len(images.classes), _joined(notes))
        if not parts and found:
            images = images_in(folder)
            train, val = held_out(images, folder, val_fraction)
            note = f"{folder} has no train/ and val/: {len(val):,} of its {len(images):,} images, of each class, are for validation"
            return NamedData(train, val, len(images.classes), _joined((class_sizes(images), note, left_out(folder))))
        held = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    raise RetrofitError(
        f"{folder} must hold the folders train and val, each with one folder of images per class, or only the "
        f"folders of the classes, with images in them; it holds {', '.join(held[:5]) or 'no folders'}"
    )


def load_split(
    name: str | Path,
    split: str | None = None,
    *,
    root: str | Path = "data",
    download: bool = False,
    image_size: int | None = None,
    val_fraction: float = 0.2,
    classes: Sequence[str] | None = None,
) -> Split:
    """Open the images to evaluate a network on, by the name of their data.

    Args:
        name: as for ``load_data``, but a folder may have any of ``train/``, ``val/`` and ``test/``.
        split: ``"train"``, ``"val"`` or ``"test"``; None for ``"val"``, or ``"test"`` if there is no ``"val"``. A folder of
            classes has ``"all"``, the default, ``"val"``, the part that ``finetune`` holds out, and ``"train"``, the rest.
        root, download, image_size, val_fraction: as for ``load_data``.
        classes: class names in the order of the network's outputs, which number a folder's classes if they include all
            of them; otherwise, and with None, classes are numbered as in ``train/``, or in the order of their names.

    Raises:
        RetrofitError: If there is no such data, or it has no such split; the message lists the splits that it has.

    Example:
        >>> from se_retrofit.finetune import load_split
        >>> print(load_split("digits", image_size=16).about)
        val of digits: 360 images
    """
    if is_of_timm(name):
        chosen = _chosen(name, split, ("train", "val", "test"))
        return _split(chosen, name, _of_timm(str(name), chosen, root, download))
    if str(name) == "digits":
        parts = dict(zip(("train", "val"), _digits(image_size), strict=True))
        chosen = _chosen(name, split, parts)
        return _split(chosen, name, parts[chosen], among=parts)
    folder = data_folder(name)
    with readable(folder):
        places = split_folders(folder)
        if not places:
            return _of_classes(folder, _chosen(folder, split or "all", ("all", "val", "train")), val_fraction, classes)
        chosen = _chosen(folder, split, places)
        place = places[chosen]
        images = Subfolder(place, numbers(place, places.get("train"), classes))
        return _split(chosen, folder, images, left_out(place), among=places)


def limited(data: Any, limit: int) -> Subset[Any]:
    """Return at most ``limit`` images of each class, always the same ones."""
    targets = targets_of(data)
    if targets is None or targets.dim() != 1:
        raise RetrofitError(
            f"{type(data).__name__} does not tell the one class of each image, so there is no limit for it"
        )
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0), device="cpu")
    taken: Counter[int] = Counter()
    kept = []
    for index, target in zip(order.tolist(), targets[order].tolist(), strict=True):
        taken[target] += 1
        kept += [index] if taken[target] <= limit else []
    if isinstance(data, Subset):  # of the data set that knows the classes
        return Subset(data.dataset, sorted(data.indices[index] for index in kept))
    return Subset(data, sorted(kept))


def trained_on(part: Split, training: Mapping[str, Any] | None) -> str:
    """Return a remark if a run with this description of its training data was trained on some of these images."""
    if training is None:
        return ""
    known = {field: value for field, value in training.items() if field != "batch size"}
    for data in (part.data, part.training):
        if data is not None and plain(describe_data(data)) == known:
            which = "these very images" if data is part.data else f"{len(data):,} of these {len(part.data):,} images"
            cure = "" if part.unseen is None else f"; --split {part.unseen} measures others"
            return f"the network was trained on {which}, so the figures flatter it{cure}"
    return ""


def _joined(notes: Iterable[str]) -> str:
    return "\n".join(filter(None, notes))


def digit_images(size: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits: images (1797, 3, size, size) with values in [-1, 1], and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 8 - 1, size=(size, size), mode="bilinear")
    return images.repeat(1, 3, 1, 1), classes


def _digits(size: int | None) -> list[TensorDataset]:
    from sklearn.model_selection import train_test_split

    size = 32 if size is None else size
    check_positive("image_size", size)
    images, classes = digit_images(size)
    parts = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=classes)
    return [TensorDataset(images[part], classes[part]) for part in parts]


def is_of_timm(name: str | Path) -> bool:
    """Return whether data of this name comes from timm's dataset factory."""
    return str(name).lower().startswith(TIMM_PREFIXES) and not Path(name).is_dir()


def _of_timm(name: str, split: str, root: str | Path, download: bool) -> Any:
    called = "validation" if split == "val" else split
    try:
        # without a mode, images stay as they are, and the transform converts them to the network's mode
        return create_dataset(
            name, root=str(root), split=called, is_training=split == "train", download=download, input_img_mode=""
        )
    except Exception as error:  # timm and the libraries behind it raise errors of all kinds, even AssertionErrors
        hint = "" if download or isinstance(error, ImportError) else "; download=True lets it be fetched"
        raise RetrofitError(f"timm can't open {name!r} in {str(root)!r}: {error}{hint}") from error


def _of_classes(folder: Path, split: str, val_fraction: float, classes: Sequence[str] | None) -> Split:
    if not class_folders(folder):
        raise RetrofitError(
            f"{folder} must hold a folder of images for each class, or train, val or test; it has no folders"
        )
    parts = None
    with contextlib.suppress(*((OSError, RetrofitError) if split == "all" else ())):  # finetune would refuse it
        parts = held_out(images_in(folder, several=classes is None), folder, val_fraction)
    if split == "all":
        whole = Subfolder(folder, numbers(folder, None, classes))
        if classes is None:
            check_several(whole.classes, folder)
        return replace(_split("all", folder, whole, left_out(folder)), unseen="val", training=parts and parts[0])
    assert parts is not None
    data, whose = parts[split == "val"], "holds out" if split == "val" else "trains on"
    about = f"{split} of {folder}: {len(data):,} of its {sum(map(len, parts)):,} images, which finetune {whose}"
    return Split(data, split, about, "val" if split == "train" else None)


def _chosen(origin: object, split: str | None, there: Iterable[str]) -> str:
    """Return the split that was asked for, or else the default one."""
    wanted = ("val", "test") if split is None else (split,)
    chosen = next((name for name in wanted if name in there), None)
    if chosen is None:
        raise RetrofitError(f"{origin} has no {' and no '.join(wanted)}: it has {' and '.join(there)}; choose a split")
    return chosen


def _split(name: str, origin: object, data: Any, note: str = "", among: Iterable[str] = ()) -> Split:
    """Describe a split, and name another one for images that no run has trained on."""
    unseen = next((part for part in ("val", "test") if part in among), None) if name == "train" else None
    return Split(data, name, "; ".join(filter(None, (f"{name} of {origin}: {len(data):,} images", note))), unseen)


def data_folder(name: str | Path) -> Path:
    """Return the folder of this name, or raise an error if there is none."""
    if not str(name) or not Path(name).is_dir():  # "" would be the current folder
        raise RetrofitError(
            f"no data {str(name)!r}: give digits, a folder with train/ and val/, or a name of timm's dataset factory "
            f"({', '.join(TIMM_PREFIXES)}...)"
        )
    return Path(name)
