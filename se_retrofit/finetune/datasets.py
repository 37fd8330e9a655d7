"""Data by name: to train and validate on, and the split of it that an evaluation measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from ..errors import RetrofitError, brief
from .experiment import describe_data, plain

__all__ = ["NamedData", "Split", "digit_images", "load_data", "load_split", "trained_on"]

TIMM_PREFIXES = ("torch/", "hfds/")
SPLITS = ("train", "val", "test", "all")
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
            ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, or ``CLASS/IMAGE`` alone, which is split; or a name of timm's
            dataset factory: ``torch/cifar10``, ``hfds/OWNER/NAME``, ...
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
        digits = _digits(image_size)
        return NamedData(digits[0], digits[1], 10)
    if is_of_timm(name):
        train, val = (_of_timm(str(name), split, root, download) for split in ("train", "val"))
        return NamedData(train, val, _count_classes(train))
    folder = data_folder(name)
    with readable(folder):
        parts, found = split_folders(folder), class_folders(folder)
        kept = parts.get("val", parts.get("test"))
        if "train" in parts and kept is not None:
            images = _images(parts["train"])
            return NamedData(images, Subfolder(kept, images.class_to_idx), len(images.classes))
        if not parts and found:
            images = _images(folder)
            train, val = held_out(images, folder, val_fraction)
            note = f"{folder} has no train/ and val/: {len(val):,} of its {len(images):,} images, of each class, are for validation"
            return NamedData(train, val, len(images.classes), note)
    raise RetrofitError(
        f"{folder} must hold the folders train and val, each with one folder of images a class, or the folders of the "
        f"classes alone; it holds {', '.join(found[:5]) or 'no folders'}"
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
        if split == "all":
            raise RetrofitError(
                f"{name}: timm opens a data set split by split, so there is no all; take train, val or test"
            )
        data = _of_timm(str(name), split or "val", root, download)
        return Split(data, split or "val", f"{split or 'val'} of {name}: {len(data):,} images")
    if str(name) == "digits":
        train, val = _digits(image_size)
        return _chosen(name, split, {"train": lambda: train, "val": lambda: val})
    folder = data_folder(name)
    with readable(folder):
        places = split_folders(folder)
        if not places:
            return _of_classes(folder, split or "all", val_fraction, classes)

        def opener(place: Path) -> Callable[[], Any]:
            others = [place] if split != "all" else places.values()
            return lambda: Subfolder(place, _numbers(others, places.get("train"), classes))

        return _chosen(folder, split, {part: opener(place) for part, place in places.items()})


def trained_on(part: Split, training: Mapping[str, Any] | None) -> str:
    """What is to be said where images are measured that a run was trained on; empty where none are.

    Args:
        part: the images.
        training: what ``describe_data`` gave for the run's training data; None where it is not known.
    """
    if training is None:
        return ""
    known = {field: value for field, value in training.items() if field != "batch size"}
    for data in (part.data, part.training):
        if data is not None and plain(describe_data(data)) == known:
            which = "these very images" if data is part.data else f"{len(data):,} of these {len(part.data):,} images"
            cure = "" if part.unseen is None else f"; --split {part.unseen} measures others"
            return f"the network was trained on {which}, so the figures flatter it{cure}"
    return ""


# By kind of data


def digit_images(size: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits: images of shape (1797, 3, size, size) with values in [-1, 1], and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    images = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 8 - 1, size=(size, size), mode="bilinear")
    return images.repeat(1, 3, 1, 1), classes


def _digits(size: int | None) -> list[TensorDataset]:
    from sklearn.model_selection import train_test_split

    images, classes = digit_images(size or 32)
    parts = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=classes)
    return [TensorDataset(images[part], classes[part]) for part in parts]


def is_of_timm(name: str | Path) -> bool:
    """Whether data of this name comes from timm's dataset factory."""
    return str(name).lower().startswith(TIMM_PREFIXES) and not Path(name).is_dir()


def _of_timm(name: str, split: str, root: str | Path, download: bool) -> Any:
    called = "validation" if split == "val" else split
    try:
        return create_dataset(name, root=str(root), split=called, is_training=split == "train", download=download)
    except Exception as error:  # timm and the libraries behind it raise of every kind, AssertionErrors too
        hint = "" if download else "; --download (download=True) lets it be fetched"
        raise RetrofitError(f"timm can't open {name!r} in {str(root)!r}: {error}{hint}") from error


def _count_classes(data: Any) -> int | None:
    for owner in (data, getattr(data, "reader", None)):
        found = getattr(owner, "classes", None) or getattr(owner, "class_to_idx", None)
        if found:
            return len(found)
    features = getattr(getattr(getattr(data, "reader", None), "dataset", None), "features", None)  # Hugging Face
    return next((int(f.num_classes) for f in (features or {}).values() if hasattr(f, "num_classes")), None)


def _of_classes(folder: Path, split: str, val_fraction: float, classes: Sequence[str] | None) -> Split:
    if split == "test":
        raise RetrofitError(
            f"{folder} has no test: it is a folder of classes, which has all, and val and train as finetune splits it"
        )
    if not class_folders(folder):
        raise RetrofitError(
            f"{folder} must hold a folder of images for each class, or train, val or test; it has no folders"
        )
    parts = None
    with contextlib.suppress(*((OSError, RetrofitError) if split == "all" else ())):  # finetune would refuse it
        parts = held_out(_images(folder, several=classes is None), folder, val_fraction)
    if split == "all":
        whole = Subfolder(folder, _numbers([folder], None, classes))
        if classes is None:
            check_several(whole.classes, folder)
        return Split(whole, split, f"all of {folder}: {len(whole):,} images", "val", parts and parts[0])
    assert parts is not None
    data, whose = parts[split == "val"], "holds out" if split == "val" else "trains on"
    about = f"{split} of {folder}: {len(data):,} of its {sum(map(len, parts)):,} images, which finetune {whose}"
    return Split(data, split, about, "val" if split == "train" else None)


def _chosen(origin: object, split: str | None, parts: Mapping[str, Callable[[], Any]]) -> Split:
    """The split that was asked for, or the one that is meant; only what is measured is opened.

    Raises:
        RetrofitError: the data has no such split.
    """
    wanted = ("val", "test") if split is None else (split,)
    chosen = next((name for name in wanted if name == "all" or name in parts), None)
    if chosen is None:
        raise RetrofitError(
            f"{origin} has no {' and no '.join(wanted)}: it has {' and '.join(parts)}; choose by split, or take all"
        )
    unseen = next((part for part in ("val", "test") if part in parts and part != chosen), None)
    if chosen != "all":
        data = parts[chosen]()
        return Split(data, chosen, f"{chosen} of {origin}: {len(data):,} images", unseen if chosen == "train" else None)
    opened = {part: open_part() for part, open_part in parts.items()}
    whole = Joined(list(opened.values()))
    about = f"all of {origin}: {len(whole):,} images, of {' and '.join(opened)}"
    return Split(whole, chosen, about, unseen, opened.get("train"))


# Folders


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


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test``, as far as they are there; none in a folder of classes, of which one may
    have such a name."""
    found = set(class_folders(folder))
    names = {split: next((name for name in known if name in found), None) for split, known in FOLDERS.items()}
    parts = {split: folder / name for split, name in names.items() if name is not None}
    others = found - {name for known in FOLDERS.values() for name in known}
    return {} if others and not any(map(class_folders, parts.values())) else parts


def _images(folder: Path, several: bool = True) -> ImageFolder:
    images = ImageFolder(str(folder))
    if several:
        check_several(images.classes, folder)
    return images


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


class Joined(ConcatDataset[Any]):
    """Several parts of the same classes, one after the other."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__(parts)
        if all(isinstance(part, ImageFolder) for part in parts):
            self.classes = parts[0].classes
            self.samples = [sample for part in parts for sample in part.samples]  # by which images are named


def _numbers(places: Iterable[Path], train: Path | None, classes: Sequence[str] | None) -> dict[str, int]:
    """The number of each class."""
    found = sorted({name for place in places for name in class_folders(place)})
    if classes is not None and set(found) <= set(classes):
        names = list(classes)
    else:
        names = found if train is None else class_folders(train)
    return {name: number for number, name in enumerate(names)}
