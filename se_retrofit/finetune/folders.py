"""Folders of images: which of them are classes, which splits, and what in them is left out."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from ..errors import RetrofitError
from ..tables import few
from .transforms import load_image

__all__ = [
    "Joined", "Subfolder", "check_several", "class_folders", "class_sizes", "files_in", "held_out", "images_in", "is_image", "left_out", "numbers", "readable",
    "split_folders",
]  # fmt: skip

# the names of a split's folder, of which the first that is there is taken
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
MOST_CLASSES = 12  # whose sizes are told one by one
MUCH = 10  # times as many images in one class as in another


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What goes wrong in reading a folder, as one line."""
    try:
        yield
    except OSError as error:
        raise RetrofitError(f"{folder} can't be read as folders of images: {error}") from error


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder that hold images, sorted; what is hidden or a file manager's is none."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not _is_hidden(entry.name) and any(map(is_image, files_in(entry)))
    )


def files_in(folder: Path) -> Iterator[str]:
    """The files in a folder and in those in it, but for what is hidden or a file manager's."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (os.path.join(place, name) for name in names if not _is_hidden(name))


def is_image(file: str) -> bool:
    """Whether it has an ending by which torchvision reads it as an image."""
    return has_file_allowed_extension(file, IMG_EXTENSIONS)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def left_out(folder: Path) -> str:
    """What in a folder of classes is not used: files that are no images, and folders without any; empty if there is nothing."""
    classes = set(class_folders(folder))
    empty = sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name not in classes and not _is_hidden(e.name))
    files = (file for name in (*sorted(classes), *empty) for file in files_in(folder / name))
    endings = Counter(Path(file).suffix.lower() or "without ending" for file in files if not is_image(file))
    files_told = few((f"{count:,} {end}" for end, count in endings.most_common()), 5)
    parts = [f"files that are no images ({files_told})"] if endings else []
    parts += [f"folders without images ({few(empty, 5)})"] if empty else []
    return f"left out of {folder}: {', '.join(parts)}" if parts else ""


def class_sizes(images: ImageFolder) -> str:
    """How many images each class has, and what to do where they differ much."""
    counts = Counter(images.targets)
    least, most = min(counts.values()), max(counts.values())
    told = "images: " + few((f"{name} {counts[n]:,}" for n, name in enumerate(images.classes)), MOST_CLASSES)
    if len(counts) > MOST_CLASSES:
        told += f" ({len(counts)} classes of {least:,} to {most:,})"
    if most > MUCH * least:
        told += '; balance="sampling" (--balance sampling) draws all classes as often'
    return told


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test``, as far as they are there; none in a folder of classes, of which one may
    have such a name."""
    found = set(class_folders(folder))
    names = {split: next((name for name in known if name in found), None) for split, known in FOLDERS.items()}
    parts = {split: folder / name for split, name in names.items() if name is not None}
    others = found - {name for known in FOLDERS.values() for name in known}
    return {} if others and not any(map(class_folders, parts.values())) else parts


def images_in(folder: Path, several: bool = True) -> Subfolder:
    """The images of a folder of classes, which must be several unless otherwise said."""
    names = class_folders(folder)
    if several:
        check_several(names, folder)
    return Subfolder(folder, {name: number for number, name in enumerate(names)})


def check_several(classes: list[str], folder: Path) -> None:
    """Raise where there is a single class."""
    if len(classes) == 1:  # most likely a folder too high up
        raise RetrofitError(
            f"{folder} holds a single class, {classes[0]}, and there is nothing to tell it from; it must hold a folder "
            "of images for each class"
        )


def held_out(images: ImageFolder, folder: Path, val_fraction: float) -> tuple[Subset[Any], Subset[Any]]:
    """What is left for training, and a part of each class for validation: the same images in every run."""
    if not 0 < val_fraction < 1:
        raise RetrofitError(f"val_fraction must be above 0 and below 1, got {val_fraction}")
    train: list[int] = []
    val: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(images.classes):
        members = [index for index, target in enumerate(images.targets) if target == number]
        kept = max(1, round(val_fraction * len(members)))
        if kept >= len(members):
            raise RetrofitError(
                f"{folder / name} has {len(members)} images, too few to train on some and validate on others; add more, or "
                "give a folder with train/ and val/"
            )
        order = torch.randperm(len(members), generator=generator).tolist()
        val += sorted(members[place] for place in order[:kept])
        train += sorted(members[place] for place in order[kept:])
    return Subset(images, train), Subset(images, val)


class Subfolder(ImageFolder):
    """A folder of images with the class numbers of another one, of which it may lack some classes."""

    def __init__(self, folder: Path, class_to_idx: dict[str, int]) -> None:
        self.wanted = class_to_idx
        root = str(folder)

        def counts(file: str) -> bool:
            return is_image(file) and not any(map(_is_hidden, file.removeprefix(root).split(os.sep)))

        super().__init__(root, allow_empty=True, is_valid_file=counts, loader=load_image)
        self.classes = list(class_to_idx)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found = class_folders(Path(directory))
        unknown = [name for name in found if name not in self.wanted]
        if unknown:
            raise RetrofitError(
                f"{directory} holds classes that the training folder lacks: {', '.join(unknown[:5])}; add them there, "
                "or remove them here"
            )
        if not found:
            raise FileNotFoundError(f"it holds no folder of a class: {directory}")
        return found, {name: self.wanted[name] for name in found}


class Joined(ConcatDataset[Any]):
    """Several parts of the same classes, one after the other."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__(parts)
        if all(isinstance(part, ImageFolder) for part in parts):
            self.classes = parts[0].classes
            self.samples = [sample for part in parts for sample in part.samples]  # by which images are named


def numbers(places: Iterable[Path], train: Path | None, classes: Sequence[str] | None) -> dict[str, int]:
    """The number of each class."""
    found = sorted({name for place in places for name in class_folders(place)})
    if classes is not None and set(found) <= set(classes):
        names = list(classes)
    else:
        names = found if train is None else class_folders(train)
    return {name: number for number, name in enumerate(names)}
