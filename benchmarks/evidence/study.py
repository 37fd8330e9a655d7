"""The runs of the first study: does SE beat longer training, and static factors? And how a run of any study is carried out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arms import ARMS, Arm
from .networks import NETWORKS
from .results import Results
from .tasks import Part, Task, folder_task, load
from .training import measured, train

RATES = (5e-4, 2e-3, 8e-3)  # of the search, the same for each arm
SEARCH_SEED = 100  # none of the seeds whose results count
BASE_LR = 4e-3


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        train, test: how many images.
        base_epochs: of the training from scratch, in passes over ``train`` images; a task that has fewer is gone over more often.
        epochs: of going on from there, likewise.
        data: a folder or a data set of timm's in the place of the generated tasks.
        image_size: of that data.
    """

    train: int = 2400
    test: int = 2000
    base_epochs: int = 6
    epochs: int = 2
    data: str | None = None
    image_size: int = 24


class Missing(LookupError):
    """A run that has not been carried out is needed where none may be."""


@dataclass(frozen=True)
class Bench:
    """Where trained bases and finished runs are found again.

    Attributes:
        folder: of ``results.jsonl`` and of the trained bases.
        setting: what all runs share.
        only_reads: whether a run that is missing raises :class:`Missing` instead of being carried out.
    """

    folder: Path
    setting: Setting
    only_reads: bool = False

    @property
    def results(self) -> Results:
        return _results(self.folder / "results.jsonl")

    def task(self, name: str) -> Task:
        return _task(name, self.setting)

    def description(self, task: str, network: str, seed: int) -> dict[str, Any]:
        """What a base depends on; every run's description holds it."""
        setting = asdict(self.setting)
        del setting["epochs"]  # of what comes after the base
        return {"task": task, "network": network, "seed": seed, **setting}

    def outcome_of(self, run: Mapping[str, Any], carry_out: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What came of a run, which is carried out where that isn't known yet."""
        if run not in self.results:
            if self.only_reads:
                raise Missing(f"{dict(run)} has not been carried out.")
            self.results.add(run, carry_out())
        return self.results[run]

    def base(self, task: str, network: str, seed: int) -> nn.Module:
        """The network trained from scratch; kept on disk."""
        file = self.folder / "bases" / f"{task}-{network}-{seed}-{digest(self.description(task, network, seed))}.pt"
        data = self.task(task)
        torch.manual_seed(seed)
        model = NETWORKS[network](data.classes)
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            train(model, data.train, epochs=self.passes(data, self.setting.base_epochs), lr=BASE_LR, seed=seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            torch.save(model.state_dict(), partial)
            partial.replace(file)
        return model

    def passes(self, data: Task, epochs: int) -> int:
        """As many passes over the task's own images as ``epochs`` over the number that was set."""
        return round(epochs * max(1, self.setting.train / len(data.train)))

    def go_on(
        self, task: str, network: str, seed: int, arm: str, lr: float, epochs: int | None = None
    ) -> dict[str, Any]:
        """One run of an arm, or what it came to before."""
        epochs = self.setting.epochs if epochs is None else epochs
        run = {"study": "arms", **self.description(task, network, seed), "arm": arm, "lr": lr, "epochs": epochs}

        def carry_out() -> dict[str, Any]:
            data = self.task(task)
            model = ARMS[arm].prepare(self.base(task, network, seed), data.train.images[:1], seed)
            return self.trained(model, data, ARMS[arm], lr, seed, epochs)

        return self.outcome_of(run, carry_out)

    def trained(
        self, model: nn.Module, data: Task, arm: Arm, lr: float, seed: int, epochs: int, part: Part | None = None
    ) -> dict[str, Any]:
        """Train a network that an arm has prepared, on the training images or on others; measure it before and after."""
        part = data.train if part is None else part
        before = measured(model, data.test)
        started = time.process_time()
        train(model, part, epochs=self.passes(data, epochs), lr=lr, seed=seed + 1, set_modes=arm.set_modes)
        seconds = time.process_time() - started
        val, test = measured(model, data.val), measured(model, data.test)
        return {
            "start_accuracy": before[0], "start_loss": before[1], "val_accuracy": val[0], "val_loss": val[1],
            "accuracy": test[0], "loss": test[1], "cpu_seconds": round(seconds, 2),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip

    def best_lr(self, task: str, network: str, arm: str) -> float:
        """The learning rate of the search with the highest accuracy on the validation images; of several, the lowest loss."""
        runs = {lr: self.go_on(task, network, SEARCH_SEED, arm, lr) for lr in RATES}
        return max(RATES, key=lambda lr: (runs[lr]["val_accuracy"], -runs[lr]["val_loss"]))


def arms_study(bench: Bench, task: str, network: str, seeds: int, arms: list[str]) -> Iterator[None]:
    """The search for each arm, then all arms with each seed; yields after every run."""
    for arm in arms:
        for lr in RATES:
            bench.go_on(task, network, SEARCH_SEED, arm, lr)
            yield
    for seed in range(seeds):
        for arm in arms:
            bench.go_on(task, network, seed, arm, bench.best_lr(task, network, arm))
            yield


def digest(description: dict[str, Any]) -> str:
    """A short name for a description, the same in every process."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


@lru_cache(maxsize=1)
def _results(path: Path) -> Results:
    return Results(path)


@lru_cache(maxsize=2)
def _task(name: str, setting: Setting) -> Task:
    if setting.data is not None:
        return folder_task(setting.data, setting.image_size)
    return load(name, setting.train, setting.test)
