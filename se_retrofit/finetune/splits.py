"""The images that an evaluation measures: a split of named data, or all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset
from torchvision.datasets import ImageFolder

from ..errors import RetrofitError, brief
from .config import FinetuneConfig
from .datasets import (
    Subfolder,
    check_several,
    class_folders,
    data_folder,
    held_out,
    is_of_timm,
    load_data,
    of_timm,
    readable,
    split_folders,
)
from .experiment import describe_data, plain
from .transforms import class_names

__all__ = ["Split", "load_split", "opened", "trained_on"]

SPLITS = ("train", "val", "test", "all")


@dataclass(frozen=True)
class Split:
    """Images that are measured.

    Attributes:
        data: a Dataset, or what else ``evaluate`` takes.
        name: ``"train"``, ``"val"``, ``"test"`` or ``"all"``; empty for data that was not opened by name.
        about: which images they are, and how many; empty likewise.
        unseen: the split in whose place images that no run trained on may be measured; None where there is no other.
        training: of ``"all"``, the images that ``finetune`` trains on, where there are such.
    """

    data: Any
    name: str = ""
    about: str = ""
    unseen: str | None = None
    training: Any = None


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
    """Images to evaluate a network on, by the name of their data.

    Args:
        name: as for ``load_data``, but a folder may have any of ``train/``, ``val/`` and ``test/``.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``. None takes ``"all"`` of a folder of classes, and elsewhere
            ``"val"``, or ``"test"`` where there is no ``"val"``. Of a folder of classes, ``"val"`` is the part that
            ``finetune`` holds out, and ``"train"`` the rest.
        root, download, image_size, val_fraction: as for ``load_data``.
        classes: names in the order of the network's outputs, by which a folder's classes are numbered if all of them are
            among these; otherwise, and with None, they are numbered as in ``train/``, or by the order of their names.

    Raises:
        RetrofitError: there is no such data, or it has no such split; the message says which it has.

    Example:
        >>> from se_retrofit.finetune import load_split
        >>> print(load_split("digits", "all", image_size=16).about)
        all of digits: 1,797 images, of train and val
    """
    if split is not None and split not in SPLITS:
        raise RetrofitError(f"split must be one of {', '.join(SPLITS)}, got {brief(split)}")
    if is_of_timm(name):
        return _of_timm(str(name), split or "val", root, download)
    if str(name) == "digits":
        digits = load_data(name, image_size=image_size)
        parts = {"train": digits.train, "val": digits.val}
        chosen = _choice(name, parts, split)
        return _parted(name, chosen, {part: parts[part] for part in _measured(chosen, parts)}, parts)
    folder = data_folder(name)
    with readable(folder):
        places = split_folders(folder)
        if not places:
            return _of_classes(folder, split or "all", val_fraction, classes)
        chosen = _choice(folder, places, split)
        measured = {part: places[part] for part in _measured(chosen, places)}
        numbers = _numbers(measured.values(), places.get("train"), classes)
        return _parted(folder, chosen, {part: Subfolder(place, numbers) for part, place in measured.items()}, places)


def opened(data: Any, split: str | None, model: nn.Module, config: FinetuneConfig) -> Split:
    """What ``evaluate`` was given to measure, opened where it is a name.

    Raises:
        RetrofitError: as ``load_split``; or a split was asked of a Dataset.
    """
    if isinstance(data, (str, Path)):
        return load_split(data, split, image_size=config.image_size, classes=class_names(model))
    if split is not None:
        raise RetrofitError(
            f"split={split!r} chooses among the images of data that is given by name, such as a folder, and a "
            f"{type(data).__name__} is measured whole; leave split out"
        )
    return data if isinstance(data, Split) else Split(data)


def trained_on(part: Split, training: Mapping[str, Any] | None) -> str:
    """What is to be said where images are measured that a run was trained on; empty where none are.

    Args:
        part: the images.
        training: what ``describe_data`` gave for the run's training data; None where it is not known.
    """
    if training is None:
        return ""
    known = {field: value for field, value in training.items() if field != "batch size"}
    cure = "" if part.unseen is None else f"; --split {part.unseen} measures others"
    if plain(describe_data(part.data)) == known:
        return f"the network was trained on these very images, so the figures flatter it{cure}"
    if part.training is not None and plain(describe_data(part.training)) == known:
        shown = f"{len(part.training):,} of these {len(part.data):,} images"
        return f"the network was trained on {shown}, so the figures flatter it{cure}"
    return ""


# By kind of data


def _of_timm(name: str, split: str, root: str | Path, download: bool) -> Split:
    if split == "all":
        raise RetrofitError(
            f"{name}: timm opens a data set split by split, so there is no all; take train, val or test"
        )
    data = of_timm(name, split, root, download)
    return Split(data, split, f"{split} of {name}{_count(data)}")


def _of_classes(folder: Path, split: str, val_fraction: float, classes: Sequence[str] | None) -> Split:
    if split == "test":
        raise RetrofitError(
            f"{folder} has no test: it is a folder of classes, which has all, and val and train as finetune splits it"
        )
    found = class_folders(folder)
    if not found:
        raise RetrofitError(
            f"{folder} must hold a folder of images for each class, or train, val or test; it has no folders"
        )
    if classes is None:
        check_several(found, folder)
    if split == "all":
        whole = Subfolder(folder, _numbers([folder], None, classes))
        about = f"all of {folder}: {len(whole):,} images"
        return Split(whole, split, about, "val", _training(folder, val_fraction))
    images = ImageFolder(str(folder))
    train, val = held_out(images, folder, val_fraction)
    data, which = (val, "which finetune holds out") if split == "val" else (train, "which finetune trains on")
    about = f"{split} of {folder}: {len(data):,} of its {len(images):,} images, {which}"
    return Split(data, split, about, "val" if split == "train" else None)


def _training(folder: Path, val_fraction: float) -> Any:
    """The images of a folder of classes that ``finetune`` would train on; None where it would refuse the folder."""
    try:
        return held_out(ImageFolder(str(folder)), folder, val_fraction)[0]
    except (OSError, RetrofitError):
        return None


def _parted(origin: object, split: str, measured: Mapping[str, Any], parts: Iterable[str]) -> Split:
    """A split of data that comes in several, or all of them; ``measured`` holds those that are opened."""
    unseen = next((part for part in ("val", "test") if part in parts and part != split), None)
    if split != "all":
        (data,) = measured.values()
        return Split(data, split, f"{split} of {origin}{_count(data)}", unseen if split == "train" else None)
    data = Joined(list(measured.values()))
    return Split(data, split, f"all of {origin}{_count(data)}, of {_listed(measured)}", unseen, measured.get("train"))


class Joined(ConcatDataset[Any]):
    """Several parts of the same classes, one after the other."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__(parts)
        if all(isinstance(part, ImageFolder) for part in parts):
            self.classes = parts[0].classes
            self.samples = [sample for part in parts for sample in part.samples]  # by which images are named


def _choice(origin: object, parts: Iterable[str], split: str | None) -> str:
    """The split that was asked for, or the one that is meant.

    Raises:
        RetrofitError: the data has no such split.
    """
    there = list(parts)
    wanted = (split,) if split is not None else ("val", "test")
    for name in wanted:
        if name == "all" or name in there:
            return name
    raise RetrofitError(
        f"{origin} has no {' and no '.join(wanted)}: it has {_listed(there)}; choose by split, or take all"
    )


def _measured(split: str, parts: Iterable[str]) -> list[str]:
    return list(parts) if split == "all" else [split]


def _numbers(places: Iterable[Path], train: Path | None, classes: Sequence[str] | None) -> dict[str, int]:
    """The number of each class."""
    found = sorted({name for place in places for name in class_folders(place)})
    if classes is not None and set(found) <= set(classes):
        names = list(classes)
    else:
        names = found if train is None else class_folders(train)
    return {name: number for number, name in enumerate(names)}


def _count(data: Any) -> str:
    try:
        return f": {len(data):,} images"
    except TypeError:  # an iterable one
        return ""


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
