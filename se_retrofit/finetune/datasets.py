"""Data by name, and the transforms that belong to a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from ..errors import RetrofitError

__all__ = [
    "NamedData",
    "Subfolder",
    "check_several",
    "class_folders",
    "data_folder",
    "digit_images",
    "held_out",
    "is_of_timm",
    "load_data",
    "of_timm",
    "readable",
    "split_folders",
]

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# the names of a split's folder, of which the first that is there is taken
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class NamedData:
    """Training and validation data, and the number of classes (None where the data does not tell).

    ``note`` says what was done to it, such as a split; empty where nothing was.
    """

    train: Any
    val: Any
    num_classes: int | None
    note: str = ""


def load_data(
    name: str | Path,
    *,
    root: str | Path = "data",
    download: bool = False,
    image_size: int | None = None,
    val_fraction: float = 0.2,
) -> NamedData:
    """Data for ``finetune`` by name.

    Args:
        name: ``digits`` (scikit-learn's 1,797 handwritten digits, which come with it); a folder that holds
            ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, or ``CLASS/IMAGE`` alone, which is split; or a name of timm's dataset factory: ``torch/cifar10``,
            ``hfds/OWNER/NAME``, ...
        root: where timm's factory keeps its data.
        download: let it fetch what is not there.
        image_size: of the digits, 32 by default. Other data gets the network's own size, or ``config.image_size``.
        val_fraction: the part of each class that is kept for validation where a folder is split; always the same images.

    Raises:
        RetrofitError: there is no such data, or a class has too few images to be split.

    Example:
        >>> from se_retrofit.finetune import load_data
        >>> data = load_data("digits", image_size=16)
        >>> len(data.train), len(data.val), data.num_classes
        (1437, 360, 10)
    """
    if str(name) == "digits":
        return _digits(image_size or 32)
    if is_of_timm(name):
        train, val = (of_timm(str(name), split, root, download) for split in ("train", "val"))
        return NamedData(train, val, _count_classes(train))
    return _from_folder(Path(name), val_fraction)


def digit_images(size: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits: images of shape (1797, 3, size, size) with values in [-1, 1], and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 8 - 1, size=(size, size), mode="bilinear")
    return images.repeat(1, 3, 1, 1), classes


def _digits(size: int) -> NamedData:
    from sklearn.model_selection import train_test_split

    images, classes = digit_images(size)
    parts = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=classes)
    train, val = (TensorDataset(images[part], classes[part]) for part in parts)
    return NamedData(train, val, 10)


def _from_folder(folder: Path, val_fraction: float) -> NamedData:
    with readable(data_folder(folder)):
        parts = split_folders(folder)
        val = parts.get("val", parts.get("test"))
        if "train" in parts and val is not None:
            train_images = ImageFolder(str(parts["train"]))
            check_several(train_images.classes, parts["train"])
            return NamedData(train_images, Subfolder(val, train_images.class_to_idx), len(train_images.classes))
        found = class_folders(folder)
        if not parts and found:
            images = ImageFolder(str(folder))
            check_several(images.classes, folder)
            train, kept = held_out(images, folder, val_fraction)
            note = (
                f"{folder} has no train/ and val/: {len(kept):,} of its {len(images):,} images, of each class, are for "
                "validation"
            )
            return NamedData(train, kept, len(images.classes), note)
    raise RetrofitError(
        f"{folder} must hold the folders train and val, each with one folder of images a class, or the folders of the "
        f"classes alone; it holds {', '.join(found[:5]) or 'no folders'}"
    )


def data_folder(name: str | Path) -> Path:
    """The folder of this name.

    Raises:
        RetrofitError: there is none.
    """
    if not Path(name).is_dir():
        raise RetrofitError(
            f"no data {str(name)!r}: give digits, a folder with train/ and val/, or a name of timm's dataset factory "
            f"({', '.join(TIMM_PREFIXES)}...)"
        )
    return Path(name)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What goes wrong in reading a folder, as one line."""
    try:
        yield
    except OSError as error:
        raise RetrofitError(f"{folder} can't be read as folders of images: {error}") from error


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test``, as far as they are there; none in a folder of classes, of which one may
    have such a name."""
    found = set(class_folders(folder))
    names = {split: next((name for name in known if name in found), None) for split, known in FOLDERS.items()}
    parts = {split: folder / name for split, name in names.items() if name is not None}
    others = found - {name for known in FOLDERS.values() for name in known}
    return {} if others and not any(map(class_folders, parts.values())) else parts


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def check_several(classes: list[str], folder: Path) -> None:
    """Raise where there is a single class."""
    if len(classes) == 1:  # most likely a folder too high up
        raise RetrofitError(
            f"{folder} holds a single class, {classes[0]}, and there is nothing to tell it from; it must hold a folder "
            "of images for each class"
        )


def held_out(images: ImageFolder, folder: Path, val_fraction: float) -> tuple[Subset[Any], Subset[Any]]:
    """What is left for training, and a part of each class for validation: the same images in every run.

    Raises:
        RetrofitError: a class has too few images.
    """
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
        super().__init__(str(folder), allow_empty=True)
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


def is_of_timm(name: str | Path) -> bool:
    """Whether data of this name comes from timm's dataset factory."""
    return str(name).lower().startswith(TIMM_PREFIXES) and not Path(name).is_dir()


def of_timm(name: str, split: str, root: str | Path, download: bool) -> Any:
    """A split of a data set of timm's factory.

    Raises:
        RetrofitError: it can't be opened.
    """
    called = "validation" if split == "val" else split
    try:
        return create_dataset(name, root=str(root), split=called, is_training=split == "train", download=download)
    except Exception as error:  # timm and the libraries behind it raise of every kind, AssertionErrors too
        hint = "" if download else "; --download (download=True) lets it be fetched"
        raise RetrofitError(f"timm can't open {name!r} in {str(root)!r}: {error}{hint}") from error


def _count_classes(data: Any) -> int | None:
    for owner in (data, getattr(data, "reader", None)):
        for attribute in ("classes", "class_to_idx"):
            found = getattr(owner, attribute, None)
            if found:
                return len(found)
    features = getattr(getattr(getattr(data, "reader", None), "dataset", None), "features", None)  # Hugging Face
    for feature in (features or {}).values():
        if hasattr(feature, "num_classes"):
            return int(feature.num_classes)
    return None
