"""Show what the gates do before and after fine-tuning on handwritten digits: a table, and a figure of each stage.

python examples/inspect_gates.py
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from se_retrofit import add_se
from se_retrofit.cli.demo_network import SmallResNet
from se_retrofit.finetune import FinetuneConfig, finetune, load_data
from se_retrofit.inspection import excitations

torch.manual_seed(0)
digits = load_data("digits", image_size=8)
loader = DataLoader(digits.val, batch_size=100)
model = SmallResNet()
finetune(model, digits.train, config=FinetuneConfig(epochs=2, lr=5e-3, cpu=True), quiet=True)

model = add_se(model)
print("before fine-tuning")
print(excitations(model, loader))

finetune(model, digits.train, config=FinetuneConfig(epochs=2, seed=1, cpu=True), quiet=True)
gates = excitations(model, loader)
print("\nafter fine-tuning")
print(gates)
figure = Path(tempfile.mkdtemp()) / "gates.png"
gates.plot(figure)
print("\nfigure:", figure)
