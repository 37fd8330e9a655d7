"""The second study: does a score from one backward pass tell where SE pays? Measured gains of single sites, against scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from se_retrofit import add_se, plan_se

from .arms import ARMS, Arm, with_se
from .scores import SCORES
from .signals import collect
from .study import Bench

DEPTH = "how deep the block is"
SITE_LR = 2e-3
IMAGES = 1000  # that the scores look at


def blocks_of(model: nn.Module, example: torch.Tensor) -> list[str]:
    return list(dict.fromkeys(site.block for site in plan_se(model, example_inputs=example).sites))


def site_run(bench: Bench, task: str, network: str, seed: int, block: str | None) -> dict[str, Any]:
    """Training SE in one block and the head, or the head alone as the control, on images that the base has not seen."""
    epochs = bench.setting.epochs
    run = {"study": "sites", **bench.description(task, network, seed), "block": block, "epochs": epochs, "lr": SITE_LR}

    def carry_out() -> dict[str, Any]:
        data = bench.task(task)
        arm = Arm("", with_se(include=block), "se") if block is not None else ARMS["head only"]
        model = arm.prepare(bench.base(task, network, seed), data.train.images[:1], seed)
        return bench.trained(model, data, arm, SITE_LR, seed, epochs, data.fresh)

    return bench.outcome_of(run, carry_out)


def site_gains(bench: Bench, task: str, network: str, seed: int) -> dict[str, float]:
    """By how much SE in each block lowers the loss below the control's, over the test and the validation images together."""
    blocks = blocks_of(bench.base(task, network, seed), bench.task(task).train.images[:1])
    data, control = bench.task(task), site_run(bench, task, network, seed, None)

    def gain(block: str) -> float:
        found = site_run(bench, task, network, seed, block)
        parts = ((len(data.test), "loss"), (len(data.val), "val_loss"))
        return sum(n * (control[name] - found[name]) for n, name in parts) / sum(n for n, _ in parts)

    return {block: gain(block) for block in blocks}


@dataclass(frozen=True)
class Scored:
    """One base's blocks, in the network's order.

    Attributes:
        gains: of each block, measured, in nats.
        scores: by the name of each score, its value for each block.
    """

    gains: list[float]
    scores: dict[str, list[float]]

    def correlations(self) -> dict[str, float]:
        """Spearman's rank correlation of each score with the gains; that of how deep a block is, for comparison."""
        scores: dict[str, Sequence[float]] = {**self.scores, DEPTH: range(len(self.gains))}
        return {name: rank_correlation(values, self.gains) for name, values in scores.items()}


def rank_correlation(these: Sequence[float], those: Sequence[float]) -> float:
    return float(spearmanr(these, those)[0])


def scored(bench: Bench, task: str, network: str, seed: int) -> Scored:
    """The gains and the scores of all blocks of one base."""
    run = {"study": "scores", **bench.description(task, network, seed), "epochs": bench.setting.epochs, "lr": SITE_LR}

    def carry_out() -> dict[str, Any]:
        gains, data = site_gains(bench, task, network, seed), bench.task(task)
        assert data.fresh is not None
        model = add_se(bench.base(task, network, seed), example_inputs=data.train.images[:1])
        seen = {path.rpartition(".")[0]: s for path, s in collect(model, data.fresh, IMAGES).items()}
        scores = {name: [score(seen[block]) for block in gains] for name, score in SCORES.items()}
        return {"gains": list(gains.values()), "scores": scores}

    return Scored(**bench.outcome_of(run, carry_out))


def sites_study(bench: Bench, task: str, network: str, seeds: int) -> Iterator[None]:
    """Every block alone, and none; then the scores. Yields after every run."""
    for seed in range(seeds):
        base = bench.base(task, network, seed)
        blocks = blocks_of(copy.deepcopy(base), bench.task(task).train.images[:1])
        for block in (None, *blocks):
            site_run(bench, task, network, seed, block)
            yield
        scored(bench, task, network, seed)
        yield
