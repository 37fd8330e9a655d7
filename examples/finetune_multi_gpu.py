"""Fine-tune with the same program on one GPU, on several, or on none (then with one process per core, through gloo).

python examples/finetune_multi_gpu.py
torchrun --nproc_per_node=2 examples/finetune_multi_gpu.py
accelerate launch --num_processes=2 examples/finetune_multi_gpu.py

batch_size is per process: with two processes, a step sees twice as many images, and lr should grow accordingly.
"""

import argparse
import os

import timm
import torch

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, finetune, load_data

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="digits", help="digits, a folder, or a name such as torch/cifar10")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--output", default="runs/multi-gpu")
options = parser.parse_args()

processes = int(os.environ.get("WORLD_SIZE", 1))
data = load_data(options.data, image_size=options.image_size)
torch.manual_seed(0)  # the same first weights in every process
model = add_se(timm.create_model("resnet10t", num_classes=data.num_classes))
config = FinetuneConfig(
    epochs=options.epochs, batch_size=64, lr=1e-3 * processes**0.5, image_size=options.image_size, head_lr_scale=1.0
)
# one process prints and writes; accuracy is over the images of all processes
finetune(model, data.train, data.val, config=config, output_dir=options.output, resume=True)
