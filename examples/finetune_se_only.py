"""Train only the SE modules of a trained network, and save them in a file of their own. Runs offline.

python examples/finetune_se_only.py
"""

import argparse

import timm
import torch

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, evaluate, finetune, load_data
from se_retrofit.saving import load_se, save_se

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--output", default="se.safetensors")
options = parser.parse_args()

data = load_data("digits", image_size=16)

# a trained network to start from; yours would come from the hub or a checkpoint
torch.manual_seed(0)
base = timm.create_model("resnet10t", num_classes=10)
finetune(base, data.train, data.val, config=FinetuneConfig(epochs=options.epochs, lr=1e-3))

# trainable="se+head" trains the classifier too; unfreeze_epoch=N trains everything from epoch N on
model = add_se(base)
result = finetune(model, data.train, data.val, config=FinetuneConfig(epochs=options.epochs, trainable="se", lr=1e-3))

trained = model.state_dict()
print("all else as it was:", all(torch.equal(value, trained[key]) for key, value in base.state_dict().items()))
save_se(model, options.output)
again = evaluate(load_se(base, options.output), data.val)
print("base and file give the same accuracy:", again.accuracy == result.best_accuracy)
