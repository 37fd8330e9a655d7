"""Folders of images: which of them are classes, which are splits, and which files are left out."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from ..errors import RetrofitError
from ..tables import counted, few
from .transforms import load_image

# the possible names of a split's folder; the first that exists is used
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
MOST_CLASSES = 12  # up to this number, the size of each class is reported
MUCH = 10  # ratio of class sizes from which balanced sampling is suggested


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn errors in reading a folder into one line."""
    try:
        yield
    except OSError as error:
        raise RetrofitError(f"{folder} can't be read as folders of images: {error}") from error


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders that hold images, except hidden ones and those of file managers."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not _is_hidden(entry.name) and any(map(is_image_file, files_in(entry)))
    )


def files_in(folder: Path) -> Iterator[str]:
    """Yield the files in a folder and its subfolders, except hidden ones and those of file managers."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (os.path.join(place, name) for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def left_out(folder: Path) -> str:
    """Describe what is not used in a folder of classes: files that are not images, and folders without images."""
    classes = set(class_folders(folder))
    empty = sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name not in classes and not _is_hidden(e.name))
    files = (file for name in (*sorted(classes), *empty) for file in files_in(folder / name))
    endings = Counter(Path(file).suffix.lower() or "without ending" for file in files if not is_image_file(file))
    files_told = few((f"{count:,} {end}" for end, count in endings.most_common()), 5)
    parts = [f"files that are no images ({files_told})"] if endings else []
    parts += [f"folders without images ({few(empty, 5)})"] if empty else []
    return f"left out of {folder}: {', '.join(parts)}" if parts else ""


def class_sizes(images: ImageFolder) -> str:
    """Describe how many images each class has, and what to do if the numbers differ much."""
    counts = Counter(images.targets)
    least, most = min(counts.values()), max(counts.values())
    told = "images: " + few((f"{name} {counts[n]:,}" for n, name in enumerate(images.classes)), MOST_CLASSES)
    if len(counts) > MOST_CLASSES:
        told += f" ({len(counts)} classes of {least:,} to {most:,})"
    if most > MUCH * least:
        told += '; balance="sampling" (--balance sampling) draws all classes as often'
    return told


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of ``train``, ``val`` and ``test``; none in a folder of classes, which may have such names."""
    found = set(class_folders(folder))
    names = {split: next((name for name in known if name in found), None) for split, known in FOLDERS.items()}
    parts = {split: folder / name for split, name in names.items() if name is not None}
    others = found - {name for known in FOLDERS.values() for name in known}
    return {} if others and not any(map(class_folders, parts.values())) else parts


def images_in(folder: Path, several: bool = True) -> Subfolder:
    """Return the images of a folder of classes; there must be several classes, unless ``several`` is False."""
    names = class_folders(folder)
    if several:
        check_several(names, folder)
    return Subfolder(folder, {name: number for number, name in enumerate(names)})


def check_several(classes: list[str], folder: Path) -> None:
    """Raise an error if there is a single class."""
    if len(classes) == 1:  # most likely a folder one level too high
        raise RetrofitError(
            f"{folder} holds a single class, {classes[0]}, and there is nothing to tell it from; it must hold a folder "
            "of images for each class"
        )


def held_out(images: ImageFolder, folder: Path, val_fraction: float) -> tuple[Subset[Any], Subset[Any]]:
    """Hold out a fraction of each class, the same images in every run; return training and validation data."""
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
                f"{folder / name} has {counted(len(members), 'image')}, too few to train on some and validate on others; add more, or "
                "give a folder with train/ and val/"
            )
        order = torch.randperm(len(members), generator=generator, device="cpu").tolist()
        val += sorted(members[place] for place in order[:kept])
        train += sorted(members[place] for place in order[kept:])
    return Subset(images, train), Subset(images, val)


class Subfolder(ImageFolder):
    """A folder of images with the class numbers of another folder; it may lack some of its classes."""

    def __init__(self, folder: Path, class_to_idx: dict[str, int]) -> None:
        self.wanted = class_to_idx
        root = str(folder)

        def counts(file: str) -> bool:
            return is_image_file(file) and not any(map(_is_hidden, file.removeprefix(root).split(os.sep)))

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


def numbers(place: Path, train: Path | None, classes: Sequence[str] | None) -> dict[str, int]:
    """Return the number of each class: as in ``classes`` if they include all that are there, or else as in ``train``."""
    found = class_folders(place)
    if classes is not None and set(found) <= set(classes):
        names = list(classes)
    else:
        names = found if train is None else class_folders(train)
    return {name: number for number, name in enumerate(names)}
