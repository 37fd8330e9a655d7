"""The tables of docs/evidence.md, from the raw results. The prose around them is written by hand and stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from .arms import ARMS
from .choices import CHOICES, choice_run
from .difference import Difference
from .gradmax import EPOCHS, gradmax_run
from .pictures import draw_differences, draw_tasks
from .scores import SCORES
from .sites import DEPTH, Scored, rank_correlation, scored
from .studies import GRADMAX_TASKS, NETWORK, SEEDS
from .study import RATES, Bench, Missing

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """Which results the page shows: those of these tasks, networks and arms, where all seeds are there.

    Args:
        bench: one that only reads; what has not been run is left out.
    """

    bench: Bench
    tasks: list[str]
    networks: list[str]
    seeds: int
    arms: list[str]

    def run(self, task: str, network: str, seed: int, arm: str) -> dict[str, Any]:
        return self.bench.go_on(task, network, seed, arm, self.bench.best_lr(task, network, arm))

    def cells(self) -> list[tuple[str, str]]:
        """Networks and tasks all of whose runs are there."""
        return [(n, t) for n in self.networks for t in self.tasks if self._is_complete(n, t)]

    def differences(self, task: str, network: str, arm: str, against: str) -> list[float]:
        """For each seed, the accuracy of an arm above that of another, in points."""
        pairs = ((self.run(task, network, s, arm), self.run(task, network, s, against)) for s in range(self.seeds))
        return [100 * (run["accuracy"] - other["accuracy"]) for run, other in pairs]

    def by_cell(self, arm: str, against: str) -> dict[str, Difference]:
        """The differences of all cells, by their names, and last that of their means."""
        found = {f"{n}, {t}": Difference.of(self.differences(t, n, arm, against)) for n, t in self.cells()}
        if len(found) > 1:
            found["all"] = Difference.of([d.mean for d in found.values()])
        return found

    def _is_complete(self, network: str, task: str) -> bool:
        try:
            for seed in range(self.seeds):
                for arm in self.arms:
                    self.run(task, network, seed, arm)
        except Missing:
            return False
        return True


def write_page(page: Path, chosen: Selection, *, pictures: bool = True) -> None:
    """Fill in what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and draw the pictures beside the page. A page that
    is missing is made.

    Args:
        page: a Markdown file.
        chosen: what it shows.
        pictures: whether they are drawn.
    """
    parts: dict[str, Callable[[Selection], str]] = {
        "setting": _setting,
        "against-plain": lambda c: _against(c, [a for a in c.arms if ARMS[a].trains == "all"], "plain"),
        "against-static": lambda c: _against(c, ["SE"], "static factors"),
        "parts-only": lambda c: _against(c, [a for a in c.arms if ARMS[a].trains != "all"], "head only"),
        "costs": _costs,
        "sites": _sites,
        "choices": _choices,
        "gradmax": _gradmax,
    }
    fill(page, {name: partial(make, chosen) for name, make in parts.items()})
    if pictures:
        _draw(page, chosen)


def fill(page: Path, parts: Mapping[str, Callable[[], str]]) -> None:
    """Make each part that the page has between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. A page that is missing is made."""
    text = page.read_text(encoding="utf-8") if page.exists() else _skeleton(list(parts))
    for name, make in parts.items():
        marks = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if marks.search(text):
            made = make()
            text = marks.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)  # type: ignore[misc]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def _draw(page: Path, chosen: Selection) -> None:
    if {"SE", "plain", "static factors"} <= set(chosen.arms) and chosen.cells():
        compared = {f"SE - {control}": chosen.by_cell("SE", control) for control in ("plain", "static factors")}
        draw_differences(compared, page.with_name(f"{page.stem}-differences.svg"))
    draw_tasks({task: chosen.bench.task(task) for task in chosen.tasks}, page.with_name(f"{page.stem}-tasks.png"))


def _skeleton(parts: list[str]) -> str:
    sections = (
        f"## {name.replace('-', ' ').capitalize()}\n\n<!-- begin {name} -->\n<!-- end {name} -->\n" for name in parts
    )
    return "# Does SE help?\n\n" + "\n".join(sections)


def _setting(chosen: Selection) -> str:
    s = chosen.bench.setting
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return (
        f"{s.train:,} images to train on, {s.test:,} to test on, {s.base_epochs} epochs from scratch, then {s.epochs} more "
        f"for each arm; {chosen.seeds} seeds; learning rates {rates}, chosen for each arm, task and network by the validation "
        f"accuracy of one further seed."
    )


def _against(chosen: Selection, arms: list[str], control: str) -> str:
    """One row per task and network, and the mean over all of them."""
    arms = [arm for arm in arms if arm != control]
    if control not in chosen.arms or not arms or not chosen.cells():
        return "No results yet."
    columns = [chosen.by_cell(arm, control) for arm in arms]
    rows = []
    for network, task in chosen.cells():
        level = 100 * fmean(chosen.run(task, network, seed, control)["accuracy"] for seed in range(chosen.seeds))
        rows.append([network, task, f"{level:.1f}", *(str(column[f"{network}, {task}"]) for column in columns)])
    if len(rows) > 1:
        rows.append(["all", f"{len(rows)} rows", "", *(str(column["all"]) for column in columns)])
    return table(["network", "task", f"{control}, %", *arms], rows)


def _costs(chosen: Selection) -> str:
    """What each arm starts from, and what a training takes, over all cells and seeds."""
    seeds = range(chosen.seeds)
    rows = []
    for arm in chosen.arms:
        runs = [chosen.run(t, n, s, arm) for n, t in chosen.cells() for s in seeds]
        plain = [chosen.run(t, n, s, chosen.arms[0]) for n, t in chosen.cells() for s in seeds]
        if not runs:
            return "No results yet."
        time = fmean(run["cpu_seconds"] / other["cpu_seconds"] for run, other in zip(runs, plain, strict=True))
        start, after = (100 * fmean(run[name] for run in runs) for name in ("start_accuracy", "accuracy"))
        rows.append([arm, f"{start:.1f}", f"{after:.1f}", f"{time:.2f}"])
    return table(["arm", "accuracy before, %", "after, %", f"time of training / {chosen.arms[0]}"], rows)


def _sites(chosen: Selection) -> str:
    """Rank correlations of the scores with the gains of single sites, by task, and over all bases. What one base's gains say of
    another's tells how much of a gain belongs to the site at all."""
    found: dict[str, list[Scored]] = {}
    for task in chosen.tasks:
        if bases := list(_present(lambda seed, task=task: scored(chosen.bench, task, NETWORK, seed))):  # type: ignore[misc]
            found[task] = bases
    if not found:
        return "No results yet."
    by_task = {task: [base.correlations() for base in bases] for task, bases in found.items()}
    rows = [_row(name, {task: [c[name] for c in each] for task, each in by_task.items()}) for name in (*SCORES, DEPTH)]
    pairs = {
        task: [rank_correlation(a.gains, b.gains) for a, b in combinations(bases, 2)] for task, bases in found.items()
    }
    if all(pairs.values()):
        means = [fmean(values) for values in pairs.values()]
        rows.append(["gains with another base", *(f"{mean:+.2f}" for mean in means), f"{fmean(means):+.2f}"])
    largest = [fmean(max(base.gains) for base in bases) for bases in found.values()]
    rows.append(["largest gain of a site, nats", *(f"{gain:.3f}" for gain in largest), f"{fmean(largest):.3f}"])
    return table(["score", *found, f"all {sum(map(len, found.values()))} bases"], rows)


def _choices(chosen: Selection) -> str:
    """Accuracy with SE at the sites of each choice above that of plain training, by task, and over all bases."""
    found: dict[str, dict[str, list[float]]] = {choice: {} for choice in CHOICES}
    parameters: dict[str, list[int]] = {choice: [] for choice in CHOICES}
    for choice, by_task in found.items():
        for task in chosen.tasks:

            def difference(seed: int, task: str = task, choice: str = choice) -> float:
                run, plain = (
                    choice_run(chosen.bench, task, NETWORK, seed, choice),
                    chosen.run(task, NETWORK, seed, "plain"),
                )
                parameters[choice].append(run["parameters"] - plain["parameters"])
                return 100 * float(run["accuracy"] - plain["accuracy"])

            if values := list(_present(difference)):
                by_task[task] = values
    if not all(found.values()):
        return "No results yet."
    rows = [[*_row(name, by_task), f"{fmean(parameters[name]):,.0f}"] for name, by_task in found.items()]
    tasks = next(iter(found.values()))
    return table(["sites", *tasks, f"all {sum(map(len, tasks.values()))} bases", "parameters"], rows)


def _row(name: str, by_task: dict[str, list[float]]) -> list[str]:
    overall = Difference.of([value for values in by_task.values() for value in values])
    return [name, *(f"{fmean(values):+.2f}" for values in by_task.values()), str(overall)]


def _gradmax(chosen: Selection) -> str:
    """Accuracy of GradMax's first layer above that of a random one, by task and number of epochs."""
    rows, everything = [], {epochs: [] for epochs in EPOCHS}  # type: ignore[var-annotated]
    for task in (t for t in chosen.tasks if t in GRADMAX_TASKS):
        cells = []
        for epochs in EPOCHS:

            def difference(seed: int, task: str = task, epochs: int = epochs) -> float:
                made, drawn = (gradmax_run(chosen.bench, task, NETWORK, seed, i, epochs) for i in ("gradmax", "random"))
                return 100 * float(made["accuracy"] - drawn["accuracy"])

            values = list(_present(difference))
            if not values:
                break
            everything[epochs] += values
            cells.append(str(Difference.of(values)))
        else:
            rows.append([task, *cells])
    if not rows:
        return "No results yet."
    rows.append(["all", *(str(Difference.of(values)) for values in everything.values())])
    return table(["task", *(f"after {n} epoch{'s' * (n > 1)}" for n in EPOCHS)], rows)


def _present(of_seed: Callable[[int], T]) -> Iterator[T]:
    """What there is for the seeds of all studies but the first."""
    for seed in range(SEEDS):
        try:
            yield of_seed(seed)
        except Missing:
            continue


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{' --- |' * len(header)}", *lines[1:]])
