"""Training for the evidence: one plain loop, the same for every arm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .arms import parameter_groups
from .tasks import Part

__all__ = ["measured", "train"]

BATCH = 50
WEIGHT_DECAY = 0.02


def train(
    model: nn.Module,
    part: Part,
    *,
    epochs: int,
    lr: float,
    seed: int,
    set_modes: Callable[[nn.Module], object] = nn.Module.train,
) -> None:
    """Train in place with AdamW and a cosine schedule after one epoch (at most a fifth of all) of warmup.

    Args:
        model: what of it requires a gradient is trained.
        part: the images.
        epochs: passes over them.
        lr: the highest learning rate; that of SE is ``SE_FACTOR`` times as high.
        seed: of the order of the images and of what the network draws, the same for every arm.
        set_modes: puts the network into train mode.
    """
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr), weight_decay=WEIGHT_DECAY)
    steps = len(part) // BATCH
    warmup = max(1, min(steps, epochs * steps // 5))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps - warmup + 1),
        ],
        [warmup],
    )
    set_modes(model)
    for _ in range(epochs):
        for batch in torch.randperm(len(part), generator=order)[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(part.images[batch]), part.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def measured(model: nn.Module, part: Part) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode."""
    model.eval()
    outputs = torch.cat([model(images) for images in part.images.split(200)])
    right = (outputs.argmax(1) == part.labels).double().mean()
    return float(right), float(F.cross_entropy(outputs.double(), part.labels))
