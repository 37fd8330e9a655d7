"""The tables and pictures of docs/evidence.md, from the raw results. The prose around them is written by hand and stays."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from .arms import ARMS
from .study import RATES, Bench

__all__ = ["Difference", "differences", "write_page"]

NOT_SEARCHED = ("plain",)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, in points, with half the width of its 95% interval (Student's t)."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Difference:
        if len(values) < 2:
            return cls(fmean(values), float("nan"), len(values))
        half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        return cls(fmean(values), half, len(values))

    def __str__(self) -> str:
        text = f"{self.mean:+.2f} ± {self.half:.2f}"
        return f"**{text}**" if abs(self.mean) > self.half else text


def differences(bench: Bench, task: str, network: str, seeds: int, arm: str, against: str) -> list[float]:
    """For each seed, the accuracy of an arm above that of another, in points."""
    return [
        100
        * (_run(bench, task, network, seed, arm)["accuracy"] - _run(bench, task, network, seed, against)["accuracy"])
        for seed in range(seeds)
    ]


def _run(bench: Bench, task: str, network: str, seed: int, arm: str) -> dict[str, Any]:
    return bench.go_on(task, network, seed, arm, bench.best_lr(task, network, arm))


def write_page(bench: Bench, page: Path, tasks: list[str], networks: list[str], seeds: int, arms: list[str]) -> None:
    """Fill in what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; a page that is missing is made."""
    parts = {
        "setting": lambda: _setting(bench, seeds),
        "against-plain": lambda: _against(bench, tasks, networks, seeds, _whole(arms), "plain"),
        "against-static": lambda: _against(bench, tasks, networks, seeds, ["SE"], "static factors"),
        "parts-only": lambda: _against(bench, tasks, networks, seeds, _only(arms), "head only"),
        "costs": lambda: _costs(bench, tasks, networks, seeds, arms),
    }
    text = page.read_text(encoding="utf-8") if page.exists() else _skeleton(parts)
    for name, make in parts.items():
        marks = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if marks.search(text):
            made = make()
            text = marks.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)  # type: ignore[misc]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def _skeleton(parts: dict[str, Callable[[], str]]) -> str:
    sections = (
        f"## {name.replace('-', ' ').capitalize()}\n\n<!-- begin {name} -->\n<!-- end {name} -->\n" for name in parts
    )
    return "# Does SE help?\n\n" + "\n".join(sections)


def _whole(arms: list[str]) -> list[str]:
    return [a for a in arms if ARMS[a].trains == "all" and a != "plain"]


def _only(arms: list[str]) -> list[str]:
    return [a for a in arms if ARMS[a].trains != "all" and a != "head only"]


def _setting(bench: Bench, seeds: int) -> str:
    s = bench.setting
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return (
        f"{s.train:,} images to train on, {s.test:,} to test on, {s.base_epochs} epochs from scratch, then {s.epochs} more for each arm; "
        f"{seeds} seeds; learning rates {rates}, chosen for each arm, task and network by the validation accuracy of one further seed."
    )


def _against(bench: Bench, tasks: list[str], networks: list[str], seeds: int, arms: list[str], control: str) -> str:
    """One row per task and network, and the mean over all of them."""
    rows, means = [], {arm: [] for arm in arms}  # type: ignore[var-annotated]
    for network in networks:
        for task in tasks:
            level = 100 * fmean(_run(bench, task, network, seed, control)["accuracy"] for seed in range(seeds))
            cells = [network, task, f"{level:.1f}"]
            for arm in arms:
                found = Difference.of(differences(bench, task, network, seeds, arm, control))
                means[arm].append(found.mean)
                cells.append(str(found))
            rows.append(cells)
    rows.append(["all", f"{len(rows)} rows", "", *(str(Difference.of(means[arm])) for arm in arms)])
    return _table(["network", "task", f"{control}, %", *arms], rows)


def _costs(bench: Bench, tasks: list[str], networks: list[str], seeds: int, arms: list[str]) -> str:
    rows = []
    for arm in arms:
        runs = [
            (_run(bench, k, n, s, arm), _run(bench, k, n, s, "plain"))
            for n in networks
            for k in tasks
            for s in range(seeds)
        ]
        start = 100 * fmean(run["start_accuracy"] for run, _ in runs)
        time = fmean(run["cpu_seconds"] / plain["cpu_seconds"] for run, plain in runs)
        rows.append([arm, f"{start:.1f}", f"{100 * fmean(run['accuracy'] for run, _ in runs):.1f}", f"{time:.2f}"])
    return _table(["arm", "accuracy before, %", "after, %", "time of training / plain"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
