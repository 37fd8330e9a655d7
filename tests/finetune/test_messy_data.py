"""Pictures and batches as people have them: read right, or named."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import network
from torchvision.datasets.folder import pil_loader

from se_retrofit.finetune import FinetuneConfig, load_data
from se_retrofit.finetune.transforms import load_image, transforms_for


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_pictures_of_16_bits_are_scaled_by_their_range(ending: str, tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16)[None].repeat(8, 0) * 257
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(values).save(tmp_path / name / f"{number}.{ending}")
    image = load_data(tmp_path).train[0][0]
    assert np.array_equal(np.asarray(image), (values // 257).astype(np.uint8)[..., None].repeat(3, 2))
    prepare = transforms_for(network(), FinetuneConfig(image_size=8), train=False)
    with Image.open(tmp_path / "a" / f"0.{ending}") as unread:  # as a data set of one's own may hand it on
        assert torch.equal(prepare(unread), prepare(image))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_palettes_and_transparency_are_as_in_torchvisions_loader(mode: str, tmp_path: Path) -> None:
    picture = Image.effect_noise((9, 7), 80).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.effect_noise((9, 7), 80))
    file = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(file, **({"transparency": bytes(range(256))} if mode == "P" else {}))
    ours = load_image(file)  # without Pillow's warning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pil_loader(str(file))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
