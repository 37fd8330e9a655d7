"""Fine-tune a retrofitted ResNet-18 on your own images in DIR/train/CLASS/ and DIR/val/CLASS/.

python examples/finetune_imagefolder.py DIR --pretrained
"""

import argparse

import timm

from se_retrofit import add_se, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, evaluate, finetune, load_data

parser = argparse.ArgumentParser()
parser.add_argument("directory")
parser.add_argument("--pretrained", action="store_true", help="ImageNet weights, which timm downloads")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--image-size", type=int, help="if not the network's own")
parser.add_argument("--output", default="runs/imagefolder")
options = parser.parse_args()

data = load_data(options.directory)
model = add_se(timm.create_model("resnet18", pretrained=options.pretrained))

# num_classes gives the network a new head; transforms come from timm's config of the network
config = FinetuneConfig(epochs=options.epochs, image_size=options.image_size, num_classes=data.num_classes)
result = finetune(model, data.train, data.val, config=config, output_dir=options.output, resume=True)

loaded = load_retrofitted(result.directory)
print(f"loaded again: {evaluate(loaded, data.val, config=config).accuracy:.2%}")
