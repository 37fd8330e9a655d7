"""Generated images in the layouts of data sets that would have to be downloaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def make_folder(root: Path, names: tuple[str, ...] = ("blue", "red")) -> Path:
    """An image folder in the layout of ImageNet, whose classes differ in their colours: 12 and 5 pictures of each."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 5)):
        for name, channel in zip(names, (2, 0, 1), strict=False):
            place = root / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (40, 50, 3), dtype=np.uint8)
                pixels[:, :, channel] += 180
                Image.fromarray(pixels).save(place / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


def cut_short(image: Path) -> Path:
    """The file of an image, without its end."""
    image.write_bytes(image.read_bytes()[:200])
    return image


def make_cifar10(root: Path) -> None:
    """The files of CIFAR-10, with 50 and 10 images of noise."""
    place = root / "cifar-10-batches-py"
    place.mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {"data": generator.integers(0, 255, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (place / name).write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
