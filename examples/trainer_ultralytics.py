"""Squeeze-and-Excitation in an Ultralytics YOLO that keeps its weights. Runs offline, on generated pictures.

python examples/trainer_ultralytics.py
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "true")

import numpy as np
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from se_retrofit import add_se, plan_of

parser = argparse.ArgumentParser()
parser.add_argument("--base", help="a trained YOLO, such as yolov8n.pt; by default one is trained here")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--image-size", type=int, default=64)
options = parser.parse_args()
settings: dict[str, Any] = {
    "epochs": options.epochs, "imgsz": options.image_size, "batch": 8, "workers": 0, "plots": False, "verbose": False,
    "project": str(Path("runs").resolve()), "exist_ok": True,
}  # fmt: skip


def make_pictures(folder: Path, count: int, seed: int) -> None:
    """Pictures of one red or blue rectangle each, with labels in YOLO's format."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        picture = random.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        (width, height), label = random.integers(12, 32, 2), random.integers(2)
        left, top = random.integers(64 - width), random.integers(64 - height)
        picture[top : top + height, left : left + width] = (220, 60, 60) if label else (60, 60, 220)
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        box = np.array([left + width / 2, top + height / 2, width, height]) / 64
        (folder / "labels" / f"{number}.txt").write_text(f"{label} {' '.join(map(str, box))}\n")


class SETrainer(DetectionTrainer):
    """Retrofits the network before the trainer creates the optimizer and the EMA."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> torch.nn.Module:
        model = add_se(super().get_model(cfg, None, verbose), reduction=8)
        if weights is not None:
            model.load(weights)  # into the retrofitted network, so that SE's weights are found when training resumes
            pairs = [(value, model.state_dict()[key]) for key, value in weights.state_dict().items()]
            print("starts from the base's weights:", all(torch.equal(*pair) for pair in pairs))
        return model


data = Path("pictures").resolve()
make_pictures(data / "train", 16, seed=0)
make_pictures(data / "val", 8, seed=1)
(data / "data.yaml").write_text(f"path: {data}\ntrain: train/images\nval: val/images\nnames: [blue, red]\n")

base = options.base
if base is None:
    yolo = YOLO("yolov8n.yaml")
    yolo.train(data=str(data / "data.yaml"), name="base", **settings)
    base = str(yolo.trainer.best)

yolo = YOLO(base)
yolo.train(trainer=SETrainer, data=str(data / "data.yaml"), name="se", **settings)

# best.pt holds the network with its SE; loading it requires se_retrofit
again = YOLO(str(yolo.trainer.best))
print(f"{type(again.model).__name__} with {len(plan_of(again.model).sites)} SE modules in {yolo.trainer.best}")
boxes = again.predict(str(data / "val" / "images"), imgsz=options.image_size, verbose=False)  # fuses the norms
print(f"{sum(len(found.boxes) for found in boxes)} boxes in {len(boxes)} pictures")
