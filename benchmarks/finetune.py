"""Images a second and peak memory of a fine-tune: the plain network, the retrofitted one, and timm's own SE network.

python benchmarks/finetune.py                         every precision, with and without torch.compile, on CUDA
python benchmarks/finetune.py --precisions fp32 --plain resnet18 --native seresnet18 --size 64 --batch 8 --cpu

The images are random numbers in memory, so that no disk and no decoder is measured. The first epoch warms up (and
compiles); the figures are the median over the others.
"""

from __future__ import annotations

import argparse
import statistics

import timm
import torch
from torch.utils.data import TensorDataset

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, finetune

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--plain", default="resnet50")
parser.add_argument("--native", default="seresnet50")
parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "fp16"])
parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off", "on"])
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--updates", type=int, default=20, help="an epoch")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

images = torch.randn(options.batch * 2, 3, options.size, options.size)
data = torch.utils.data.ConcatDataset(
    [TensorDataset(images, torch.arange(len(images)) % 10)] * max(1, options.updates // 2)
)
networks = {
    options.plain: lambda: timm.create_model(options.plain, num_classes=10),
    # as timm's own: the same function of the same number of parameters
    f"{options.plain} + add_se": lambda: add_se(
        timm.create_model(options.plain, num_classes=10), 16, gate="sigmoid", bias=True, min_hidden=8
    ),
    options.native: lambda: timm.create_model(options.native, num_classes=10),
}
device = "cpu" if options.cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
print(f"{device}, torch {torch.__version__}, batches of {options.batch} images of {options.size}x{options.size}\n")
print("| network | precision | compile | images/s | peak MiB |")
print("| --- | --- | --- | --- | --- |")
for precision in options.precisions:
    for compiled in options.compile:
        for name, build in networks.items():
            config = FinetuneConfig(
                epochs=options.epochs,
                batch_size=options.batch,
                precision=precision,
                compile=compiled == "on",
                cpu=options.cpu,
                workers=0 if options.cpu else 8,
                log_every=options.updates,
            )
            history = finetune(build(), data, config=config, quiet=True).history[1:]
            speed = statistics.median(row["images_per_second"] for row in history)
            memory = max(row.get("peak_memory_mb", 0.0) for row in history)
            print(f"| {name} | {precision} | {compiled} | {speed:,.0f} | {memory:,.0f} |", flush=True)
