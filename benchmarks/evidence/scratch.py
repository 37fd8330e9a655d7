"""Where does SE's gain come from? A small network on Fashion-MNIST, with SE from the start, with SE halfway, and without it, at equal
epochs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from se_retrofit.finetune import param_groups

from .arms import with_se
from .networks import residual
from .packages import fashion
from .real import RATES_OF_SE, RealBench, best_rate, resized
from .study import SEARCH_SEED
from .tasks import Part, Task
from .training import Recipe, measured, train

EPOCHS = 6
TRAIN, TEST = 2000, 2000
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


@dataclass(frozen=True)
class Course:
    """How a network is trained from scratch.

    Attributes:
        native: whether it has SE, with the paper's gate, from the start.
        halves: whether training begins anew after half of the epochs, with a schedule of its own.
        retrofit: whether SE comes in between.
    """

    native: bool = False
    halves: bool = False
    retrofit: bool = False


SCRATCH_ARMS = {
    "plain": Course(),
    "SE from the start": Course(native=True),
    "plain, then plain": Course(halves=True),
    "plain, then SE": Course(halves=True, retrofit=True),
}


@lru_cache(maxsize=2)
def task(packages: Path, seed: int) -> Task:
    """Images drawn by the seed to train on, the same ones for all to test on; 24 pixels wide, as the network's."""
    read = fashion(packages)
    order = torch.randperm(len(read["train"][0]), generator=torch.Generator().manual_seed(seed))
    parts = []
    for part, chosen in (("train", order[:TRAIN]), ("train", order[-TEST:]), ("t10k", torch.arange(TEST))):
        images, labels = (values[chosen] for values in read[part])
        parts.append(Part(((resized(images, 24).float() / 255 - 0.3) / 0.35).contiguous(), labels))
    return Task(*parts)


def equal(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """SE learns as fast as the rest, as networks with SE are trained."""
    return [{"params": list(model.parameters()), "lr": lr}]


def scratch_run(bench: RealBench, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """One training from scratch, or what came of it before."""
    described = {"study": "scratch", "arm": arm, "lr": lr, "seed": seed, "epochs": EPOCHS, "train": TRAIN, "test": TEST}
    if SCRATCH_ARMS[arm].retrofit:
        described["rates"] = RATES_OF_SE
    return bench.outcome(described, partial(carry_out, arm, lr, seed))


def carry_out(arm: str, lr: float, seed: int, packages: Path) -> dict[str, Any]:
    course = SCRATCH_ARMS[arm]
    data = task(packages, seed)
    example = data.train.images[:1]
    torch.manual_seed(seed)
    model = residual(data.classes)
    if course.native:
        model = with_se(gate="sigmoid")(model, example)
    if course.halves:
        train(model, data.train, epochs=EPOCHS // 2, lr=lr, seed=seed + 1, recipe=Recipe(equal))
        model = with_se()(model, example) if course.retrofit else model
        groups = partial(param_groups, head_lr_scale=1.0, weight_decay=Recipe.weight_decay)
        train(model, data.train, epochs=EPOCHS // 2, lr=lr, seed=seed + 2, recipe=Recipe(groups))
    else:
        train(model, data.train, epochs=EPOCHS, lr=lr, seed=seed + 1, recipe=Recipe(equal))
    accuracy, loss = measured(model, data.val if seed == SEARCH_SEED else data.test)
    return {"accuracy": accuracy, "loss": loss, "parameters": sum(p.numel() for p in model.parameters())}


def searched(bench: RealBench, arm: str) -> float:
    """The learning rate that is best for one further seed."""
    return best_rate(RATES, lambda lr: scratch_run(bench, arm, lr, SEARCH_SEED))


def scratch_runs(bench: RealBench, seeds: int) -> Iterator[None]:
    """The search for each arm, then all arms with each seed; yields after every run."""
    for seed in range(seeds):
        for arm in SCRATCH_ARMS:
            scratch_run(bench, arm, searched(bench, arm), seed)
            yield
