"""Which learning rates does SE bear? The same fine-tunes at several of them, without SE, and with SE whose layers learn at several
parts of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .real import KEPT, RATES_OF_SE, RealBench, Tuning

GRID_RATES = (1e-3, 3e-3, 1e-2)
GRID_SEEDS = 4
NOW_AND_BEFORE = (RATES_OF_SE, "lr")
EPOCHS = {"emoji": 2, "Fashion-MNIST": 2}
REDUCTIONS = (4, 8, 32)
# the arms without SE, and what the names of those with SE end with
SCOPES = {"frozen": (("norms", f"norms{KEPT}"), ""), "all trained": (("plain, all",), ", all")}


def grid(optimizer: str, scope: str, task: str, lr: float, seed: int) -> dict[str, Tuning]:
    """The fine-tunes that are compared with each other, by what they show: the arms without SE by their names, and those with
    it by reduction and rates, as ``"r = 8, lr"``."""
    controls, suffix = SCOPES[scope]
    found = {control: Tuning(task, control, lr, seed, EPOCHS[task], optimizer) for control in controls}
    for rates in NOW_AND_BEFORE:
        for r in REDUCTIONS:
            arm = f"SE, r = {r}{suffix}"
            found[f"r = {r}, {rates}"] = Tuning(task, arm, lr, seed, EPOCHS[task], optimizer, rates)
    return found


def grid_runs(
    bench: RealBench,
    optimizer: str,
    scopes: Iterable[str] = tuple(SCOPES),
    rates: Iterable[float] = GRID_RATES,
    seeds: int = GRID_SEEDS,
) -> Iterator[None]:
    """All of them, seed by seed; yields after every run."""
    for seed in range(seeds):
        for lr in sorted(rates, reverse=True):
            for scope in scopes:
                for task in EPOCHS:
                    for tuning in grid(optimizer, scope, task, lr, seed).values():
                        bench.run(tuning)
                        yield
