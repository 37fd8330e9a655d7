"""An exported file tells how images are prepared and what the classes are called, so that it gives the answers of ``predict``."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, randomise_se
from PIL import Image
from torch import nn

from se_retrofit import add_se, export
from se_retrofit.exporting.images import prepared
from se_retrofit.finetune import predict, transform_of
from se_retrofit.models import IMAGES

pytestmark = pytest.mark.xdist_group("compilers")

CLASSES = ["bee", "Ähre", 'the "third"', *"0123456"]
SETTINGS: dict[str, Any] = {
    "input_size": [3, 40, 40], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "crop_pct": 0.9,
    "crop_mode": "center",
}  # fmt: skip
TOLD = {**SETTINGS, "classes": CLASSES, "multi_label": False}

# each runs where neither this package nor a part of it can be imported
PROGRAM = """
import json, math, runpy, sys
sys.modules["se_retrofit"] = None
from PIL import Image

folder, several = sys.argv[1], []

import numpy, onnxruntime
session = onnxruntime.InferenceSession(folder + "/net.onnx")
told = session.get_modelmeta().custom_metadata_map
size, crop = json.loads(told["input_size"])[1], float(told["crop_pct"])
assert told["crop_mode"] == "center" and told["interpolation"] == "bicubic" and told["multi_label"] == "false"
with Image.open(folder + "/image.jpg") as image:
    around = math.floor(size / crop)
    scale = around / min(image.size)
    image = image.convert("RGB").resize([int(n * scale) for n in image.size], Image.Resampling.BICUBIC)
left, top = (round((n - size) / 2) for n in image.size)
pixels = numpy.asarray(image.crop((left, top, left + size, top + size)), numpy.float32) / 255
mean, std = (numpy.asarray(json.loads(told[name]), numpy.float32) for name in ("mean", "std"))
images = ((pixels - mean) / std).transpose(2, 0, 1)[None]
(logits,) = session.run(["logits"], {"images": images})
several.append([json.loads(told["classes"]), logits[0].tolist()])

import torch
extra = {"metadata.json": ""}
program = torch.export.load(folder + "/net.pt2", extra_files=extra)
told = json.loads(extra["metadata.json"])
assert (told["input_names"], told["output_names"]) == (["images"], ["logits"])
source = runpy.run_path(folder + "/net.py")
with Image.open(folder + "/image.jpg") as image:
    images = source["transform"]()(image)[None]
with torch.no_grad():
    several.append([told["classes"], program.module()(images)[0].tolist()])
    several.append([source["CLASSES"], source["load"]()(images)[0].tolist()])
print(json.dumps(several))
"""


def classifier(**told: Any) -> nn.Module:
    model = randomise_se(add_se(NETWORKS["timm/test_resnet"].build()))
    vars(model)[IMAGES] = {**TOLD, **told}
    return model


def picture(width: int = 90, height: int = 61) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_each_format_answers_as_predict_does_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, image = classifier(), tmp_path / "image.jpg"
    picture().save(image)
    for ending in ("onnx", "pt2", "py"):
        export(model, tmp_path / f"net.{ending}")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    arguments = [sys.executable, "-I", "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wanted,) = predict(model, [image], top=3)
    for classes, logits in json.loads(done.stdout):
        found = torch.tensor(logits).softmax(0).topk(3)
        assert tuple(classes[n] for n in found.indices) == wanted.classes
        torch.testing.assert_close(found.values, torch.tensor(wanted.probabilities), rtol=1e-3, atol=1e-5)


def test_a_source_prepares_images_and_names_classes_as_the_network_does(tmp_path: Path) -> None:
    model = classifier()
    source = runpy.run_path(str(export(model, tmp_path / "net.py")))
    assert (source["CLASSES"], source["MULTI_LABEL"]) == (CLASSES, False)
    assert torch.equal(source["transform"]()(picture()), transform_of(model)(picture()))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(40, 40), (40, 56)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.3])
def test_images_are_prepared_as_by_timm_bit_for_bit(crop_mode: str, size: tuple[int, int], crop_pct: float) -> None:
    model = nn.Conv2d(1, 1, 1)
    # timm 1.0.20 resizes to a size that is no square by "bilinear", whatever it is told
    kinds = ("bicubic", "lanczos") if size == (40, 40) or crop_mode != "center" else ("bilinear",)
    for channels, interpolation in ((1, "bilinear"), *((3, kind) for kind in kinds)):
        settings = {
            "input_size": [channels, *size], "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation,
            "mean": TOLD["mean"][:channels], "std": TOLD["std"][:channels],
        }  # fmt: skip
        vars(model)[IMAGES] = {**TOLD, **settings}
        for given in ((90, 61), (61, 90), (20, 33), (45, 45)):
            image = picture(*given)
            assert torch.equal(prepared(image, **settings), transform_of(model)(image)), (settings, given)


def test_grey_of_16_bits_is_scaled_by_its_range(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (61, 90), np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wanted = prepared(Image.fromarray(np.rint(grey / 257).astype(np.uint8)), **SETTINGS)
    with Image.open(tmp_path / "grey.png") as image:
        assert torch.equal(prepared(image, **SETTINGS), wanted)
        assert torch.equal(transform_of(classifier())(image), wanted)


def test_a_program_is_made_for_images_of_the_size_that_the_network_was_trained_on(tmp_path: Path) -> None:
    extra = {"metadata.json": ""}
    program = torch.export.load(str(export(classifier(multi_label=True), tmp_path / "net.pt2")), extra_files=extra)
    assert program.module()(torch.randn(3, 3, 40, 40)).shape == (3, 10)
    told = json.loads(extra["metadata.json"])
    assert (told["classes"], told["multi_label"], told["input_names"]) == (CLASSES, True, ["images"])


@pytest.mark.parametrize("told", [{}, {"classes": None}])
def test_what_is_not_known_is_not_told(told: dict[str, Any], tmp_path: Path) -> None:
    model = classifier(**told)
    if not told:
        del vars(model)[IMAGES]
    source = runpy.run_path(str(export(model, tmp_path / "net.py")))
    assert source.get("CLASSES") is None
    assert ("transform" in source) == bool(told)
