"""The tasks: images in which something of the whole picture matters, generated with knobs for it; digits; and a user's own data.

Every generated task has ten classes and images of 3x24x24. Its parts (training, validation, test) are drawn from seeds of their
own, so no image is in two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 24
CLASSES = 10


@dataclass(frozen=True)
class Part:
    """Images ``(N, 3, H, W)`` and their classes ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """The parts of a task, and how many classes it has. ``fresh`` are images that the base was not trained on, None where there are
    no more."""

    train: Part
    val: Part
    test: Part
    fresh: Part | None = None
    classes: int = CLASSES


class Draw:
    """Random values of one part, one row per image."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.generator)

    def choice(self, among: int) -> Tensor:
        return torch.randint(among, (self.count,), generator=self.generator)


def grid() -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


def grating(angle: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """Stripes in [-1, 1], one image for each angle, ``(N, H, W)``."""
    x, y = grid()
    return torch.sin(column(frequency) * (x * column(angle).cos() + y * column(angle).sin()) + column(phase))


def shape_mask(kind: Tensor, size: Tensor, left: Tensor, top: Tensor, turn: Tensor) -> Tensor:
    """One of ten outlines per image, 1 inside and 0 outside: polygons and stars in polar coordinates, soft at the edge."""
    x, y = grid()
    dx, dy = x - column(left), y - column(top)
    radius, angle = (dx**2 + dy**2).sqrt(), torch.atan2(dy, dx) - column(turn)
    corners = torch.tensor([2.0, 3, 4, 5, 6, 2, 3, 4, 5, 6])[kind]
    depth = torch.tensor([0.3] * 5 + [0.6] * 5)[kind]
    outline = column(size) * (1 - column(depth) * (0.5 + 0.5 * torch.cos(column(corners) * angle)))
    return torch.sigmoid((outline - radius) * 3 * SIZE)


def colour_cast(count: int, seed: int, strength: float = 0.8) -> Part:
    """The class is the paint of a patch, one of ten hues, under light of any colour: only what the rest of the picture shows of
    the light tells paint and light apart. ``strength`` is how far the light may be from white."""
    draw = Draw(count, seed)
    labels = draw.choice(CLASSES)
    hue = labels / CLASSES * 2 * torch.pi
    paint = torch.stack([0.55 + 0.35 * torch.cos(hue - shift) for shift in (0, 2.09, 4.19)], 1)
    light = 1 + strength * draw.uniform(-1, 1, 3)
    mask = shape_mask(
        draw.choice(CLASSES), draw.uniform(0.35, 0.6), *draw.uniform(-0.4, 0.4, 2).T, draw.uniform(0, 6.3)
    )
    wall = 0.55 + 0.25 * F.interpolate(draw.normal(3, 6, 6), SIZE, mode="bilinear")
    picture = torch.lerp(wall, paint[:, :, None, None].expand_as(wall), mask[:, None])
    return Part(finished(picture * light[:, :, None, None], draw, 0.08), labels)


def illumination(count: int, seed: int, strength: float = 1.6) -> Part:
    """Stripes of five directions and two widths under light whose strength, colour and direction vary: brightness and contrast
    tell nothing. ``strength`` is the range of the brightness in powers of e."""
    draw = Draw(count, seed)
    labels = draw.choice(CLASSES)
    angle = labels % 5 * torch.pi / 5 + draw.uniform(-0.2, 0.2)
    stripes = grating(angle, 9 + 4 * (labels // 5) + draw.uniform(-1.2, 1.2), draw.uniform(0, 6.3))
    x, y = grid()
    slope = draw.uniform(-0.8, 0.8, 2)
    ramp = torch.exp(column(slope[:, 0]) * x + column(slope[:, 1]) * y)
    light = torch.exp(strength * draw.uniform(-1, 1, 1, 1)) * ramp
    picture = (light * (0.5 + 0.2 * stripes))[:, None] * draw.uniform(0.4, 1.0, 3, 1, 1)
    return Part(finished(picture, draw, 0.25), labels)


def texture(count: int, seed: int, strength: float = 0.35) -> Part:
    """Outlines filled with one texture before another, lighter than it or darker: what is shape and what is texture is a matter of
    the whole picture. ``strength`` is the textures' contrast."""
    draw = Draw(count, seed)
    labels = draw.choice(CLASSES)
    mask = placed_shape(draw, 5 + labels % 5, 0.75, 0.95)
    inside, outside = (grating(draw.uniform(0, torch.pi), draw.uniform(6, 20), draw.uniform(0, 6.3)) for _ in range(2))
    tone = column(draw.uniform(0.3, 0.6) * (2.0 * (labels // 5) - 1))
    picture = torch.lerp(strength * outside, strength * inside + tone, mask)
    colour = draw.uniform(0.4, 1.0, 3, 1, 1)
    return Part(finished(picture[:, None] * colour, draw, 0.1), labels)


def scale(count: int, seed: int, strength: float = 3.0) -> Part:
    """The class is how large an outline is in units of the grid behind it, while the whole picture is shown at any scale up to
    ``strength``: neither size alone nor the grid alone tells."""
    draw = Draw(count, seed)
    labels = draw.choice(CLASSES)
    zoom = torch.exp(draw.uniform(0, 1) * torch.log(torch.tensor(strength)))
    ratio = 0.10 * 1.22**labels * torch.exp(0.04 * draw.normal())
    size = (zoom * ratio).clamp(max=0.95)
    mask = shape_mask(torch.full_like(labels, 9), size, *draw.uniform(-0.2, 0.2, 2).T, draw.uniform(0, 6.3))
    behind = grating(torch.zeros(count), 22 / zoom, draw.uniform(0, 6.3))
    behind = behind * grating(torch.full((count,), torch.pi / 2), 22 / zoom, draw.uniform(0, 6.3))
    picture = torch.lerp(0.5 * behind, torch.ones_like(behind), mask)
    return Part(finished(picture[:, None].expand(-1, 3, -1, -1), draw, 0.15), labels)


def clutter(count: int, seed: int, strength: float = 0.75) -> Part:
    """Small faint outlines among scattered blobs whose colour goes with the class, in a share ``strength`` of the images: context
    that helps without deciding."""
    draw = Draw(count, seed)
    labels = draw.choice(CLASSES)
    mask = placed_shape(draw, labels, 0.4, 0.6)
    told = draw.uniform(0, 1) < strength
    hint = torch.where(told, labels // 2, draw.choice(CLASSES // 2))  # five colours for ten classes
    hue = hint / 5 * 2 * torch.pi
    colour = torch.stack([0.5 + 0.5 * torch.cos(hue - shift) for shift in (0, 2.09, 4.19)], 1)
    x, y = grid()
    blobs = torch.zeros(count, SIZE, SIZE)
    for _ in range(6):
        centre = draw.uniform(-1, 1, 2)
        blobs += torch.exp(-((x - column(centre[:, 0])) ** 2 + (y - column(centre[:, 1])) ** 2) / 0.02)
    picture = 0.35 * mask[:, None] + 0.6 * blobs[:, None] * colour[:, :, None, None]
    return Part(finished(picture, draw, 0.2), labels)


def placed_shape(draw: Draw, labels: Tensor, smallest: float, largest: float) -> Tensor:
    return shape_mask(labels, draw.uniform(smallest, largest), *draw.uniform(-0.25, 0.25, 2).T, draw.uniform(-0.3, 0.3))


def finished(picture: Tensor, draw: Draw, noise: float) -> Tensor:
    """With noise, and scaled by fixed numbers to about unit size, as normalisation by a data set's mean and deviation does."""
    return ((picture + noise * draw.normal(3, SIZE, SIZE)) - 0.4) / 0.4


GENERATED: dict[str, Callable[[int, int], Part]] = {
    "colour cast": colour_cast,
    "illumination": illumination,
    "texture": texture,
    "scale": scale,
    "clutter": clutter,
}


def load(name: str, train: int, test: int) -> Task:
    """A task by name.

    Args:
        name: one of ``GENERATED``, or ``"digits"``: scikit-learn's handwritten digits, of which there are 1,797.
        train: how many images to train on; the validation has half as many. Digits have 600 and 300 at most.
        test: how many images to test on; digits have 897.
    """
    if name == "digits":
        return digits(min(train, 600))
    make = GENERATED[name]
    return Task(make(train, 1), make(train // 2, 2), make(test, 3), make(train, 4))


def digits(train: int) -> Task:
    """Handwritten digits, each under light of its own: brightness by a factor of up to 2."""
    from se_retrofit.finetune.datasets import digit_images

    images, labels = digit_images(SIZE)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    light = 0.5 + 1.5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    images = (images + 1) * light - 1 + 0.3 * torch.randn(images.shape, generator=generator)
    train_part, val, test = (
        Part(images[part].contiguous(), labels[part])
        for part in (order[:train], order[train : train + train // 2], order[900:])
    )
    return Task(train_part, val, test)


def folder_task(data: str, image_size: int) -> Task:
    """A folder with ``train/CLASS/*`` and ``val/CLASS/*``, or the name of a data set that timm loads (``torch/cifar10``): the test
    is its validation part, and a fifth of its training part is held out to choose learning rates by."""
    from timm.data import create_dataset, create_transform

    root = "" if "/" in data and not Path(data).exists() else data
    name = data if not root else ""
    transform = create_transform((3, image_size, image_size), is_training=False)
    parts = []
    for split in ("train", "validation"):
        found = create_dataset(name, root=root or None, split=split, transform=transform)
        images, labels = zip(*(found[i] for i in range(len(found))), strict=True)
        parts.append(Part(torch.stack(images), torch.tensor(labels)))
    rest, test = parts
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
    held = len(rest) // 5
    classes = int(max(rest.labels.max(), test.labels.max())) + 1
    train, val = (Part(rest.images[part], rest.labels[part]) for part in (order[held:], order[:held]))
    return Task(train, val, test, classes=classes)
