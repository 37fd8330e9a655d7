"""The fourth study: half of SE's parameters, at the sites that a score chooses, at the last ones, or at random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from se_retrofit import plan_se

from .arms import REDUCTION, Arm, with_se
from .sites import scored
from .study import Bench

SHARE = 0.5  # of the parameters that SE has at all sites
BY_SCORE = {
    "by covariance": "covariance, |Cov(g, s)|²",
    "by held-out gain": "held-out gain of a quadratic model",
}
CHOICES = (*BY_SCORE, "the last sites", "random sites", "all sites")


def chosen_blocks(bench: Bench, task: str, network: str, seed: int, choice: str) -> list[str]:
    """The first blocks in the choice's order that stay within the budget together."""
    plan = plan_se(
        bench.base(task, network, seed), reduction=REDUCTION, example_inputs=bench.task(task).train.images[:1]
    )
    parameters: dict[str, int] = {}
    for site in plan.sites:
        parameters[site.block] = parameters.get(site.block, 0) + site.parameters
    order = list(parameters)
    if choice == "all sites":
        return order
    if choice in BY_SCORE:
        scores = dict(zip(order, scored(bench, task, network, seed).scores[BY_SCORE[choice]], strict=True))
        order.sort(key=lambda block: -scores[block])
    elif choice == "the last sites":
        order.reverse()
    else:
        random.Random(seed).shuffle(order)
    left, blocks = SHARE * sum(parameters.values()), []
    for block in order:
        if parameters[block] <= left:
            left -= parameters[block]
            blocks.append(block)
    return blocks


def choice_run(bench: Bench, task: str, network: str, seed: int, choice: str) -> dict[str, Any]:
    """Training the whole network with SE at the sites of a choice, by the recipe of the first study's SE arm."""
    lr, epochs = bench.best_lr(task, network, "SE"), bench.setting.epochs
    run = {"study": "choices", **bench.description(task, network, seed), "choice": choice, "epochs": epochs, "lr": lr}

    def carry_out() -> dict[str, Any]:
        blocks = chosen_blocks(bench, task, network, seed, choice)
        arm, data = Arm("", with_se(include=blocks)), bench.task(task)
        model = arm.prepare(bench.base(task, network, seed), data.train.images[:1], seed)
        return {**bench.trained(model, data, arm, lr, seed, epochs), "blocks": blocks}

    return bench.outcome_of(run, carry_out)


def choices_study(bench: Bench, task: str, network: str, seeds: int) -> Iterator[None]:
    for seed in range(seeds):
        for choice in CHOICES:
            choice_run(bench, task, network, seed, choice)
            yield
