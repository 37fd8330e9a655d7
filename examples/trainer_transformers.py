"""Squeeze-and-Excitation in an image classifier of transformers, trained by its Trainer. Runs offline.

python examples/trainer_transformers.py
"""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from se_retrofit import add_se, load_retrofitted, save_retrofitted

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
options = parser.parse_args()


class Pictures(Dataset):
    """Pictures that are brighter on the left or on the right."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        picture[:, :, 16 * (index % 2) :][:, :, :16] += 0.5
        return {"pixel_values": picture, "labels": torch.tensor(index % 2)}


torch.manual_seed(0)
# yours: ResNetForImageClassification.from_pretrained("microsoft/resnet-50")
config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=2)
base = ResNetForImageClassification(config)

model = add_se(base)  # before the Trainer, which creates the optimizer
arguments = TrainingArguments(
    "trained", num_train_epochs=options.epochs, per_device_train_batch_size=16, learning_rate=5e-3, use_cpu=True,
    report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=Pictures())
trainer.train()

# from_pretrained would build the network without SE; load_retrofitted adds SE again
save_retrofitted(model, "retrofitted")
again = load_retrofitted("retrofitted", base=ResNetForImageClassification(model.config))
pictures = torch.stack([Pictures()[index]["pixel_values"] for index in range(16)])
with torch.no_grad():
    scores = model.eval()(pictures).logits
    print("loaded again, same outputs:", torch.equal(again(pictures).logits, scores))
print(f"right: {(scores.argmax(1) == torch.arange(16) % 2).float().mean():.0%}")
