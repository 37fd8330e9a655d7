"""Squeeze-and-Excitation in a Lightning module, loaded again from Lightning's checkpoint. Runs offline.

python examples/trainer_lightning.py
"""

import argparse
from typing import Any

import lightning
import timm
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import add_se
from se_retrofit.finetune import param_groups

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
options = parser.parse_args()


class Classifier(lightning.LightningModule):
    """Retrofits its network in ``__init__``, so that load_from_checkpoint finds the keys that were saved."""

    def __init__(self, name: str = "resnet10t", classes: int = 2, reduction: int = 8, pretrained: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = add_se(timm.create_model(name, num_classes=classes, pretrained=pretrained), reduction=reduction)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups(self.network, lr=1e-3))


# pictures that are brighter on the left or on the right
generator = torch.Generator().manual_seed(0)
labels = torch.arange(64) % 2
images = torch.rand(64, 3, 32, 32, generator=generator)
images[labels == 0, :, :, :16] += 0.5
images[labels == 1, :, :, 16:] += 0.5

lightning.seed_everything(0, verbose=False)
model = Classifier()
trainer = lightning.Trainer(
    max_epochs=options.epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
    enable_model_summary=False, log_every_n_steps=1,
)  # fmt: skip
trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=16))

path = trainer.checkpoint_callback.best_model_path
again = Classifier.load_from_checkpoint(path).eval()
print("loaded again from Lightning's checkpoint, same outputs:", torch.equal(again(images), model.eval()(images)))
print(f"right: {(again(images).argmax(1) == labels).float().mean():.0%}")
