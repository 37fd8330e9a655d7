"""What the gates do before and after fine-tuning, on handwritten digits: a table, and a figure of each stage.

python examples/inspect_gates.py
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import add_se, excitations
from se_retrofit.cli.demo_network import SmallResNet, load_digits, train

torch.manual_seed(0)
digits = load_digits()
loader = DataLoader(TensorDataset(digits.val_images, digits.val_labels), batch_size=100)
model = SmallResNet()
train(model, digits, epochs=2, lr=5e-3, seed=0, on_epoch=lambda epoch, loss: None)

model = add_se(model)
print("before fine-tuning")
print(excitations(model, loader))

train(model, digits, epochs=2, lr=1e-3, seed=1, on_epoch=lambda epoch, loss: None)
gates = excitations(model, loader)
print("\nafter fine-tuning")
print(gates)
figure = Path(tempfile.mkdtemp()) / "gates.png"
gates.plot(figure)
print("\nfigure:", figure)
