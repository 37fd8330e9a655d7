"""What the demo works on: digits, a small residual network such as people write, a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Digits", "ResidualBlock", "SmallResNet", "load_digits", "predict", "train"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip around them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.project = None
        if stride != 1 or inputs != outputs:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.project is None else self.project(x)
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += skip
        return F.relu(out)


class SmallResNet(nn.Module):
    """A residual network for 8x8 images: a stem, three stages, a linear classifier.

    Args:
        widths: channels of each stage; every stage but the first halves the resolution.
        depth: blocks per stage.
        classes: how many classes it tells apart.

    Example:
        >>> import torch
        >>> from se_retrofit.cli.demo_network import SmallResNet
        >>> SmallResNet()(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential()
        inputs = widths[0]
        for i, width in enumerate(widths):
            blocks = []
            for j in range(depth):
                blocks.append(ResidualBlock(inputs, width, stride=2 if i > 0 and j == 0 else 1))
                inputs = width
            self.stages.append(nn.Sequential(*blocks))
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)`` with values in [0, 1] and their labels, to train on and to validate on."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor


def load_digits() -> Digits:
    """The 1797 handwritten digits that scikit-learn ships: 1198 to train on, 599 to validate on, always the same.

    Example:
        >>> from se_retrofit.cli.demo_network import load_digits
        >>> load_digits().val_images.shape
        torch.Size([599, 1, 8, 8])
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    pixels, labels = datasets.load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=1 / 3, random_state=0, stratify=labels)
    train_x, val_x = (torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for x in parts[:2])
    train_y, val_y = (torch.as_tensor(y, dtype=torch.long) for y in parts[2:])
    return Digits(train_x, train_y, val_x, val_y)


def train(
    model: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train with AdamW under a one-cycle schedule.

    Args:
        model: changed in place.
        digits: the data.
        epochs: passes over the training images.
        lr: peak learning rate.
        seed: of the order of the images. The same seed gives the same batches, whatever the model.
        batch_size: images per step.
        on_epoch: called after each epoch with its number, from 1, and its mean loss.
    """
    order = torch.Generator().manual_seed(seed)
    images, labels = digits.train_images, digits.train_labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(images), generator=order)[: steps * batch_size].split(batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        on_epoch(epoch, total / steps)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs for all images, in eval mode."""
    return model.eval()(images)
