"""Training for the evidence: one plain loop, the same for every arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .arms import parameter_groups
from .tasks import Part

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        groups: of parameters, by the highest learning rate.
        optimizer: ``"adamw"`` or ``"sgd"``.
        weight_decay: of the groups that don't have their own.
        batch: images in one.
        warmup: part of all updates, at most one epoch.
        clip: what the gradient's norm is clipped to.
        smoothing: of the labels.
    """

    groups: Callable[[nn.Module, float], list[dict[str, Any]]] = parameter_groups
    optimizer: str = "adamw"
    weight_decay: float = 0.02
    batch: int = 50
    warmup: float = 0.2
    clip: float | None = None
    smoothing: float = 0.0


def train(
    model: nn.Module,
    part: Part,
    *,
    epochs: int,
    lr: float,
    seed: int,
    set_modes: Callable[[nn.Module], object] = nn.Module.train,
    recipe: Recipe = Recipe(),
) -> None:
    """Train in place with a cosine schedule after the warmup.

    Args:
        model: what of it requires a gradient is trained.
        part: the images.
        epochs: passes over them.
        lr: the highest learning rate, from which the recipe's groups have theirs.
        seed: of the order of the images and of what the network draws, the same for every arm.
        set_modes: puts the network into train mode.
        recipe: the rest; the default has SE learn ``SE_FACTOR`` times as fast as what is around it.
    """
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[recipe.optimizer](recipe.groups(model, lr), lr=lr, weight_decay=recipe.weight_decay)
    steps = len(part) // recipe.batch
    warmup = max(1, min(steps, int(epochs * steps * recipe.warmup)))
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
        for batch in torch.randperm(len(part), generator=order)[: steps * recipe.batch].split(recipe.batch):
            loss = F.cross_entropy(model(part.images[batch]), part.labels[batch], label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def measured(model: nn.Module, part: Part) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode."""
    model.eval()
    outputs = torch.cat([model(images) for images in part.images.split(200)])
    right = (outputs.argmax(1) == part.labels).double().mean()
    return float(right), float(F.cross_entropy(outputs.double(), part.labels))
