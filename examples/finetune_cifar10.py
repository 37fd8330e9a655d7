"""Fine-tune a retrofitted ResNet-18 on CIFAR-10, with mixup, an average of the weights and early stopping.

python examples/finetune_cifar10.py --download
"""

import argparse

import timm

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, finetune, load_data

parser = argparse.ArgumentParser()
parser.add_argument("--root", default="data", help="where torchvision keeps CIFAR-10")
parser.add_argument("--download", action="store_true")
parser.add_argument("--pretrained", action="store_true", help="ImageNet weights, which timm downloads")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--image-size", type=int, default=64)
parser.add_argument("--output", default="runs/cifar10")
options = parser.parse_args()

data = load_data("torch/cifar10", root=options.root, download=options.download)
model = add_se(timm.create_model("resnet18", pretrained=options.pretrained, num_classes=10), reduction=16)
config = FinetuneConfig(
    epochs=options.epochs,
    batch_size=128,
    lr=5e-4,
    image_size=options.image_size,
    transform_options={"scale": (0.6, 1.0)},
    mixup=0.2,
    ema_decay=0.999,
    patience=8,
)
result = finetune(model, data.train, data.val, config=config, output_dir=options.output, resume=True)
print(f"{result.best_accuracy:.2%} in epoch {result.best_epoch}, stopped by {result.stopped}")
