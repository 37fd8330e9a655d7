"""Data by name, and the transforms that belong to a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from ..errors import RetrofitError
from ..models import Base
from .config import FinetuneConfig

__all__ = ["NamedData", "load_data", "transforms_for"]

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
VALIDATION = ("val", "validation", "valid", "test")  # folders that are looked for, in this order


@dataclass(frozen=True)
class NamedData:
    """Training and validation data, and the number of classes (None where the data does not tell)."""

    train: Any
    val: Any
    num_classes: int | None


def load_data(
    name: str | Path, *, root: str | Path = "data", download: bool = False, image_size: int | None = None
) -> NamedData:
    """Data for ``finetune`` by name.

    Args:
        name: ``digits`` (scikit-learn's 1,797 handwritten digits, which come with it); a folder that holds
            ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``; or a name of timm's dataset factory: ``torch/cifar10``,
            ``hfds/OWNER/NAME``, ...
        root: where timm's factory keeps its data.
        download: let it fetch what is not there.
        image_size: of the digits, 32 by default. Other data gets the network's own size, or ``config.image_size``.

    Raises:
        RetrofitError: there is no such data.

    Example:
        >>> from se_retrofit.finetune import load_data
        >>> data = load_data("digits", image_size=16)
        >>> len(data.train), len(data.val), data.num_classes
        (1437, 360, 10)
    """
    if str(name) == "digits":
        return _digits(image_size or 32)
    if str(name).lower().startswith(TIMM_PREFIXES) and not Path(name).is_dir():
        return _from_timm(str(name), root, download)
    return _from_folder(Path(name))


def _digits(size: int) -> NamedData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images, classes, test_size=0.2, random_state=0, stratify=classes)
    x_train, x_val = (_upscaled(torch.tensor(x, dtype=torch.float32), size) for x in parts[:2])
    y_train, y_val = (torch.tensor(y, dtype=torch.long) for y in parts[2:])
    return NamedData(TensorDataset(x_train, y_train), TensorDataset(x_val, y_val), 10)


def _upscaled(pixels: Tensor, size: int) -> Tensor:
    """8x8 grey levels from 0 to 16, as three channels in [-1, 1] of the wanted size."""
    images = F.interpolate(pixels.view(-1, 1, 8, 8) / 8 - 1, size=(size, size), mode="bilinear", align_corners=False)
    return images.repeat(1, 3, 1, 1)


def _from_folder(folder: Path) -> NamedData:
    if not folder.is_dir():
        raise RetrofitError(
            f"no data {str(folder)!r}: give digits, a folder with train/ and val/, or a name of timm's dataset factory "
            f"({', '.join(TIMM_PREFIXES)}...)"
        )
    train = folder / "train"
    val = next((folder / name for name in VALIDATION if (folder / name).is_dir()), None)
    if not train.is_dir() or val is None:
        found = sorted(f.name for f in folder.iterdir() if f.is_dir())
        raise RetrofitError(
            f"{folder} must hold the folders train and val, each with one folder of images a class; "
            f"it holds {', '.join(found[:5]) or 'no folders'}"
        )
    try:
        train_images = ImageFolder(str(train))
        val_images = Subfolder(val, train_images.class_to_idx)
    except (FileNotFoundError, OSError) as error:
        raise RetrofitError(f"{folder} can't be read as folders of images: {error}") from error
    return NamedData(train_images, val_images, len(train_images.classes))


class Subfolder(ImageFolder):
    """A folder of images with the class numbers of another one, of which it may lack some classes."""

    def __init__(self, folder: Path, class_to_idx: dict[str, int]) -> None:
        self.wanted = class_to_idx
        super().__init__(str(folder), allow_empty=True)
        self.classes = list(class_to_idx)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir())
        unknown = [name for name in found if name not in self.wanted]
        if unknown:
            raise RetrofitError(
                f"{directory} holds classes that the training folder lacks: {', '.join(unknown[:5])}; add them there, "
                "or remove them here"
            )
        if not found:
            raise FileNotFoundError(f"it holds no folder of a class: {directory}")
        return found, {name: self.wanted[name] for name in found}


def _from_timm(name: str, root: str | Path, download: bool) -> NamedData:
    parts = []
    for split, training in (("train", True), ("validation", False)):
        try:
            parts.append(create_dataset(name, root=str(root), split=split, is_training=training, download=download))
        except Exception as error:  # timm and the libraries behind it raise of every kind, AssertionErrors too
            hint = "" if download else "; --download (download=True) lets it be fetched"
            raise RetrofitError(f"timm can't open {name!r} in {str(root)!r}: {error}{hint}") from error
    return NamedData(parts[0], parts[1], _count_classes(parts[0]))


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


def transforms_for(
    model: nn.Module, config: FinetuneConfig, *, train: bool, base: Base | None = None
) -> Callable[[Any], Any]:
    """timm's transforms with the network's own size, mean, std and interpolation; for training, with the config's
    augmentation. Where neither the network nor ``base`` tells them, ImageNet's usual ones."""
    own = _data_config(model, base)
    channels, *size = own["input_size"]
    if config.image_size is not None:
        size = [config.image_size, config.image_size]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's remarks on interpolation
        transform = create_transform(
            (channels, *size),
            is_training=train,
            scale=(config.crop_scale, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            interpolation=own["interpolation"],
            mean=own["mean"],
            std=own["std"],
            crop_pct=own["crop_pct"],
            crop_mode=own["crop_mode"],
        )
    return Prepared(transform, "L" if channels == 1 else "RGB")


class Prepared:
    """A transform, after the image got the mode that the network takes. (A function in a function can't be pickled.)"""

    def __init__(self, transform: Callable[[Any], Any], mode: str) -> None:
        self.transform, self.mode = transform, mode

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image if image.mode == self.mode else image.convert(self.mode))


def _data_config(model: nn.Module, base: Base | None) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config:
        return dict(resolve_data_config({}, pretrained_cfg=config))
    default = dict(resolve_data_config({"input_size": (3, 224, 224)}))
    if base is None or base.library != "torchvision":
        return default
    try:
        preset = torchvision.models.get_model_weights(base.name).DEFAULT.transforms()
        size, mean, std = preset.crop_size[0], tuple(preset.mean), tuple(preset.std)
        return {
            **default, "input_size": (3, size, size), "mean": mean, "std": std,
            "crop_pct": size / preset.resize_size[0], "interpolation": preset.interpolation.value,
        }  # fmt: skip
    except (AttributeError, ValueError, IndexError):  # no weights, or weights of another task
        return default
