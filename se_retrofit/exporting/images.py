"""What an exported file records about images: how they are prepared, and the names of their classes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from ..models import IMAGES


def metadata_of(model: nn.Module) -> dict[str, Any]:
    """Return what ``predict`` needs to know of a network that was fine-tuned on images; empty for other networks."""
    return {name: value for name, value in (vars(model).get(IMAGES) or {}).items() if value is not None}


def prepared(
    image: PIL.Image.Image,
    input_size: list[int],
    mean: list[float],
    std: list[float],
    interpolation: str,
    crop_pct: float,
    crop_mode: str,
) -> Tensor:
    """Prepare an image for the network, (channels, height, width): resize it, crop its centre, and normalise it."""
    channels, *size = input_size
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # 16-bit grey
        image = image.convert("I").point(lambda value: value / 257 + 0.5)
    image = image.convert("L" if channels == 1 else "RGB")
    given, wanted = (image.height, image.width), [math.floor(n / crop_pct) for n in size]
    ratios = [have / want for have, want in zip(given, wanted, strict=True)]
    if crop_mode == "squash":
        resized = wanted
    elif crop_mode == "border":
        resized = [round(n / max(ratios)) for n in given]
    elif wanted[0] == wanted[1]:
        resized = [int(wanted[0] * n / min(given)) for n in given]
    else:
        resized = [round(n / min(ratios)) for n in given]
    image = image.resize((resized[1], resized[0]), PIL.Image.Resampling[interpolation.upper()])
    top, left = ((w - n) // 2 if n < w else -round((n - w) / 2) for n, w in zip(resized, size, strict=True))
    fill = tuple(round(255 * n) if crop_mode == "border" else 0 for n in mean)
    canvas = PIL.Image.new(image.mode, (size[1], size[0]), fill)
    canvas.paste(image, (left, top))
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(*size, -1).permute(2, 0, 1)
    return (pixels.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


_TEXT = '''
CLASSES = {classes}  # by their numbers, None where they have no names
MULTI_LABEL = {several}  # whether an image may have several: then sigmoid gives the probabilities, otherwise softmax

IMAGES = {settings}


{prepared}

def transform():
    """What makes of an image, as PIL opens it, what the network takes but for the batch."""
    return functools.partial(prepared, **IMAGES)
'''


def images_text(model: nn.Module) -> tuple[str, set[str]]:
    """Return the part of an exported source that prepares images, and what it imports; empty if that is unknown."""
    told = metadata_of(model)
    if not told:
        return "", set()
    classes, several = told.pop("classes", None), told.pop("multi_label")
    settings = "{" + "".join(f"\n    {name!r}: {value!r}," for name, value in told.items()) + "\n}"
    text = _TEXT.format(
        classes=classes, several=several, settings=settings,
        prepared=inspect.getsource(prepared),
    )  # fmt: skip
    return text, {"functools", "math", "PIL.Image"}
