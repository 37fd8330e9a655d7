"""How images are prepared for a network: in training, in validation and in later use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose

from ..errors import RetrofitError
from ..fields import BATCH_SIZE, label_column
from ..models import IMAGES, SETTINGS, settings_of
from ..tables import few
from .config import FinetuneConfig
from .data import gives_images, stream
from .randomness import kept_randomness

AUGMENTATION = {"scale": (0.35, 1.0), "hflip": 0.5, "color_jitter": 0.0}  # for timm's transforms in training


def transform_of(model: nn.Module) -> Callable[[Any], Any]:
    """Return the transform for the images of a fine-tuned network: from PIL image to tensor, as in its validation.

    Args:
        model: a network that ``finetune`` trained on PIL images, or that was loaded from such a run.

    Raises:
        RetrofitError: If it was not fine-tuned on PIL images, so that their preparation is unknown.

    Example:
        >>> import tempfile, timm
        >>> from PIL import Image
        >>> from se_retrofit import add_se, load_retrofitted, save_retrofitted
        >>> from se_retrofit.finetune import FinetuneConfig, finetune, transform_of
        >>> pictures = [(Image.new("RGB", (40, 30), color), color == "red") for color in ("red", "blue") * 4]
        >>> model = add_se(timm.create_model("resnet10t", num_classes=2))
        >>> config = FinetuneConfig(epochs=1, batch_size=4, image_size=64, workers=0)
        >>> _ = finetune(model, pictures, config=config, quiet=True)
        >>> again = load_retrofitted(save_retrofitted(model, tempfile.mkdtemp()))
        >>> transform_of(again)(Image.new("RGB", (40, 30))).shape
        torch.Size([3, 64, 64])
    """
    settings = vars(model).get(IMAGES)
    if settings is None:
        raise RetrofitError(
            f"this {type(model).__name__} does not tell how its images are prepared: it was not fine-tuned on PIL images by "
            "finetune; for a network of timm, timm.data.create_transform(**timm.data.resolve_data_config({}, model=model)) "
            "gives the transform of its pretrained weights"
        )
    return _transform(settings)


def class_names(model: nn.Module) -> list[str] | None:
    """Return the names of the classes that a network was fine-tuned on, or None if they are unknown."""
    names = vars(model).get(IMAGES, {}).get("classes")
    return None if names is None else list(names)


def has_several_labels(model: nn.Module) -> bool:
    """Return whether a network was fine-tuned with several labels per image."""
    return bool(vars(model).get(IMAGES, {}).get("multi_label"))


def note_images(model: nn.Module, data: Any, config: FinetuneConfig) -> None:
    """Note on the network how its images are prepared, if the data are PIL images."""
    if not gives_images(data, config.keys):
        vars(model).pop(IMAGES, None)
        return
    told = {"classes": class_names_of(data, config.keys), "multi_label": config.multi_label}
    vars(model)[IMAGES] = {**settings_of(model, config.image_size), **told}


def check_classes(model: nn.Module, data: Any, keys: Sequence[str] = ()) -> None:
    """Raise an error if the data numbers its classes differently from the data that the network was fine-tuned on."""
    if differing := other_classes(model, data, keys):
        raise RetrofitError(f"{differing}; their numbers must agree: give data with the same classes in the same order")


def other_classes(model: nn.Module, data: Any, keys: Sequence[str] = ()) -> str:
    """Describe how the data's classes differ from those of the head; empty if they don't, or are unknown."""
    known, given = class_names(model), class_names_of(data, keys)
    if known is None or given is None or known == given:
        return ""
    return f"the network was fine-tuned on the classes {few(known, 5)}, and the data has {few(given, 5)}"


def class_names_of(data: Any, keys: Sequence[str] = ()) -> list[str] | None:
    """Return the names of a data set's classes by number; None if unknown, or renumbered by a ``target_transform``."""
    owners: list[Any] = [data, getattr(data, "reader", None), getattr(data, "dataset", None)]
    for owner in owners:
        if getattr(owner, "target_transform", None) is not None:
            return None
        names = getattr(owner, "classes", None) or getattr(owner, "class_to_idx", None)
        if not names and (column := label_column(owner, keys)) is not None:
            names = getattr(owner.features[column], "names", None)
        if isinstance(names, dict):
            names = sorted(names, key=names.__getitem__)
        if isinstance(names, (list, tuple)):
            return [str(name) for name in names]
    return None


def prepared_batches(
    model: nn.Module, data: Any, config: FinetuneConfig, tell: Callable[[str], object]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of 32 images and targets, prepared as for validation; ``tell`` gets complaints that are skipped."""
    config = config.replace(batch_size=BATCH_SIZE)
    images = stream(data, config, transforms_for(model, config, train=False), name="data")
    with closing(images):
        for batch in images.batches(0):
            for complaint in batch.complaints:
                tell(complaint)
            if batch.counts.any():
                yield batch.images[batch.counts], batch.targets[batch.counts]


def transforms_for(model: nn.Module, config: FinetuneConfig, *, train: bool) -> Callable[[Any], Any]:
    """Return timm's transforms with the network's own settings or the usual ones; in training, with augmentation."""
    augmentation = {**AUGMENTATION, **config.transform_options} if train else {}
    try:
        transform = _transform(settings_of(model, config.image_size), is_training=train, **augmentation)
        with kept_randomness():
            transform(Image.new("RGB", (64, 64)))  # most values are only checked here
    except Exception as error:  # timm, torchvision and Pillow raise errors of all kinds
        raise RetrofitError(
            f"timm makes no transform with transform_options={config.transform_options}: {error}"
        ) from error
    return transform


def _transform(settings: dict[str, Any], **options: Any) -> Callable[[Any], Any]:
    chosen = {name: settings[name] for name in SETTINGS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's remarks on interpolation
        transform = create_transform(**chosen, **options)
    return Compose([partial(_in_colors, mode="L" if chosen["input_size"][0] == 1 else "RGB"), transform])


def load_image(file: str | Path) -> Image.Image:
    """Load an image as torchvision does, except that 16-bit grey is scaled by its range, not cut off at 255."""
    with Image.open(file) as image:
        return _in_colors(image, "RGB")


def _in_colors(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"
    ):  # the latter in older versions of Pillow
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if image.mode == mode:
        image.load()  # which may fail, and closes the file
        return image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remark on the transparency of palettes
        return image.convert(mode)
