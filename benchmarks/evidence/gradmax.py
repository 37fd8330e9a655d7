"""The third study: SE's first layer from the data, as in GradMax (Evci et al., arXiv:2201.05125), against a random one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from se_retrofit import SEAttention

from .arms import ARMS, Arm
from .signals import Signals, collect
from .study import Bench

EPOCHS = (1, 5, 20)
GRADMAX_LR = 2e-3
IMAGES = 1000


def first_layer(signals: Signals, weight: Tensor) -> Tensor:
    """Rows along the leading right singular vectors of ``Cov(g, s)``, which make the last layer's first gradient as large as rows of
    their size can. They come in pairs of opposite sign, so that for any input one of each pair is alive, and are as long as those
    that they replace."""
    gradients = signals.gradients - signals.gradients.mean(0)
    covariance = gradients.T @ (signals.squeezed - signals.squeezed.mean(0)) / len(gradients)
    pairs = len(weight) // 2
    rows = torch.linalg.svd(covariance).Vh[:pairs].to(weight.dtype)
    made = weight.clone()
    made[:pairs], made[pairs : 2 * pairs] = rows, -rows
    made[: 2 * pairs] *= weight[: 2 * pairs].norm(dim=1, keepdim=True)
    return made


def gradmax_run(bench: Bench, task: str, network: str, seed: int, init: str, epochs: int) -> dict[str, Any]:
    """Going on with SE from a first layer that was drawn (``"random"``) or made from the training images (``"gradmax"``)."""
    run = {
        "study": "gradmax",
        **bench.description(task, network, seed),
        "init": init,
        "epochs": epochs,
        "lr": GRADMAX_LR,
    }

    def build(base: nn.Module, example: Tensor) -> nn.Module:
        model = ARMS["SE"].build(base, example)
        if init == "gradmax":
            for path, signals in collect(model, bench.task(task).train, IMAGES).items():
                se = model.get_submodule(path)
                assert isinstance(se, SEAttention)
                with torch.no_grad():
                    first = se.get_parameter("fc.0.weight")
                    first.copy_(first_layer(signals, first))
        return model

    def carry_out() -> dict[str, Any]:
        arm, data = Arm("", build), bench.task(task)
        model = arm.prepare(bench.base(task, network, seed), data.train.images[:1], seed)
        return bench.trained(model, data, arm, GRADMAX_LR, seed, epochs)

    return bench.outcome_of(run, carry_out)


def gradmax_study(bench: Bench, task: str, network: str, seeds: int) -> Iterator[None]:
    for seed in range(seeds):
        for epochs in EPOCHS:
            for init in ("random", "gradmax"):
                gradmax_run(bench, task, network, seed, init, epochs)
                yield
