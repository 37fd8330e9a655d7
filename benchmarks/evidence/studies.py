"""The studies, and how they fall into units of work that processes take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .choices import choices_study
from .gradmax import gradmax_study
from .sites import sites_study
from .study import Bench, arms_study
from .tasks import GENERATED

SEEDS = 3  # of all but the first study
NETWORK = "residual"  # theirs
GRADMAX_TASKS = ("colour cast", "texture", "scale")


@dataclass(frozen=True)
class Unit:
    """One study on one task and network."""

    bench: Bench
    study: str
    task: str
    network: str
    seeds: int
    arms: list[str] = field(default_factory=list)

    def runs(self) -> Iterator[None]:
        return STUDIES[self.study](self)

    def __str__(self) -> str:
        return f"{self.study}: {self.task}, {self.network}"


STUDIES: dict[str, Callable[[Unit], Iterator[None]]] = {
    "arms": lambda unit: arms_study(unit.bench, unit.task, unit.network, unit.seeds, unit.arms),
    "sites": lambda unit: sites_study(unit.bench, unit.task, unit.network, unit.seeds),
    "choices": lambda unit: choices_study(unit.bench, unit.task, unit.network, unit.seeds),
    "gradmax": lambda unit: gradmax_study(unit.bench, unit.task, unit.network, unit.seeds),
}


def units_of(
    bench: Bench, studies: list[str], tasks: list[str], networks: list[str], seeds: int, arms: list[str]
) -> Iterator[Unit]:
    """The studies of sites and of GradMax take generated tasks, one network and fewer seeds."""
    generated = [t for t in tasks if t in GENERATED]
    chosen = {
        "sites": generated,
        "choices": generated,
        "gradmax": [t for t in generated if t in GRADMAX_TASKS],
    }
    for study in studies:
        for network in networks:
            if study == "arms":
                yield from (Unit(bench, study, task, network, seeds, arms) for task in tasks)
            elif network == NETWORK:
                yield from (Unit(bench, study, task, network, min(seeds, SEEDS)) for task in chosen[study])
