"""The tables and the picture of the second part of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from .difference import Difference
from .page import fill, table
from .pictures import draw_differences
from .real import CELLS, KEPT, Cell, RealBench
from .robustness import EPOCHS, GRID_RATES, GRID_SEEDS, NOW_AND_BEFORE, REDUCTIONS, SCOPES, grid
from .scratch import SCRATCH_ARMS, scratch_run, searched
from .study import Missing

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
NAMES = {"head": "head only", "static": "static factors"}


def write_real(page: Path, bench: RealBench, seeds: int, *, pictures: bool = True) -> None:
    """Fill in the second part's tables, and draw its picture beside the page.

    Args:
        page: a Markdown file.
        bench: what has not been run is left out.
        seeds: of each cell.
        pictures: whether it is drawn.
    """
    done = {name: cell for name, cell in CELLS.items() if _is_complete(bench, cell, seeds)}
    frozen, whole = (
        {n: c for n, c in done.items() if (c.arms[0] == "head") == is_frozen} for is_frozen in (True, False)
    )
    fill(
        page,
        {
            "real-frozen": partial(_cells, bench, frozen, seeds),
            "real-all": partial(_cells, bench, whole, seeds),
            "real-scratch": partial(_scratch, bench, seeds),
            "robustness": partial(_robustness, bench),
            "robustness-best": partial(_best_rates, bench),
        },
    )
    if pictures and done:
        arms = list(dict.fromkeys(_short(arm) for cell in done.values() for arm in cell.arms[1:]))
        compared: dict[str, dict[str, Difference]] = {arm: {} for arm in arms}
        for name, cell in done.items():
            for arm in cell.arms[1:]:
                compared[_short(arm)][name] = _difference(bench, cell, arm, seeds)
        draw_differences(compared, page.with_name(f"{page.stem}-real.svg"))


def _short(arm: str) -> str:
    name = arm.removesuffix(KEPT).removesuffix(", all")
    return NAMES.get(name, name)


def _run(bench: RealBench, cell: Cell, arm: str, seed: int) -> dict[str, Any]:
    return bench.run(cell.tuning(arm, bench.search(cell, arm), seed))


def _is_complete(bench: RealBench, cell: Cell, seeds: int) -> bool:
    try:
        for arm in cell.arms:
            for seed in range(seeds):
                _run(bench, cell, arm, seed)
    except Missing:
        return False
    return True


def _difference(bench: RealBench, cell: Cell, arm: str, seeds: int) -> Difference:
    """The accuracy of an arm above that of the cell's first, in points, paired by seed."""
    pairs = ((_run(bench, cell, arm, seed), _run(bench, cell, cell.arms[0], seed)) for seed in range(seeds))
    return Difference.of([100 * (run["accuracy"] - other["accuracy"]) for run, other in pairs])


def _cells(bench: RealBench, cells: dict[str, Cell], seeds: int) -> str:
    """One row per cell, the mean over them, and the parameters that are trained; a cell may lack some of the arms."""
    if not cells:
        return "No results yet."
    first, *others = dict.fromkeys(arm for cell in cells.values() for arm in cell.arms)
    rows = []
    for name, cell in cells.items():
        level = 100 * fmean(_run(bench, cell, first, seed)["accuracy"] for seed in range(seeds))
        found = [str(_difference(bench, cell, arm, seeds)) if arm in cell.arms else "" for arm in others]
        rows.append([name, f"{level:.1f}", *found])
    if len(rows) > 1:
        means = ([_difference(bench, c, arm, seeds).mean for c in cells.values() if arm in c.arms] for arm in others)
        rows.append(["all", "", *(str(Difference.of(column)) for column in means)])
    widest = next(iter(cells.values()))
    rows.append(["parameters trained", *(f"{_run(bench, widest, arm, 0)['parameters']:,}" for arm in (first, *others))])
    return table(["cell", f"{_short(first)}, %", *map(_short, others)], rows)


def _scratch(bench: RealBench, seeds: int) -> str:
    rows = []
    try:
        plain = [scratch_run(bench, "plain", searched(bench, "plain"), seed) for seed in range(seeds)]
        for arm in SCRATCH_ARMS:
            lr = searched(bench, arm)
            runs = [scratch_run(bench, arm, lr, seed) for seed in range(seeds)]
            above = Difference.of([100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs, plain, strict=True)])
            level = 100 * fmean(run["accuracy"] for run in runs)
            rows.append(
                [arm, f"{level:.1f}", "" if arm == "plain" else str(above), f"{lr:g}", f"{runs[0]['parameters']:,}"]
            )
    except Missing:
        return "No results yet."
    return table(["trained from scratch", "accuracy, %", "above plain", "learning rate", "parameters"], rows)


def _robustness(bench: RealBench) -> str:
    """A row for each setting of which anything was run."""
    rows = []
    for optimizer, scope, task in product(OPTIMIZERS, SCOPES, EPOCHS):
        for lr in sorted(GRID_RATES, reverse=True):
            found = _levels(bench, optimizer, scope, task, lr)
            if any(found.values()):
                without = [found[control] for control in SCOPES[scope][0]]
                now, before = ([found[f"r = {r}, {rates}"] for r in REDUCTIONS] for rates in NOW_AND_BEFORE)
                shown = (" / ".join(map(_spread, levels)) for levels in (without, now, before))
                rows.append([scope, OPTIMIZERS[optimizer], task, f"{lr:g}", *shown, _changes(now, before)])
    heads = ["trained", "optimizer", "pictures", "lr", "without SE", "SE now", "SE before", "now - before"]
    return table(heads, rows) if rows else "No results yet."


def _best_rates(bench: RealBench) -> str:
    """A row for each setting, with the learning rate that is best on average for each column."""
    rows = []
    for optimizer, scope, task in product(OPTIMIZERS, SCOPES, EPOCHS):
        by_rate = [_levels(bench, optimizer, scope, task, lr) for lr in GRID_RATES]
        without = [_best(by_rate, control) for control in SCOPES[scope][0]]
        now, before = ([_best(by_rate, f"r = {r}, {rates}") for r in REDUCTIONS] for rates in NOW_AND_BEFORE)
        shown = (" / ".join(map(_spread, levels)) for levels in (without, now, before))
        rows.append([scope, OPTIMIZERS[optimizer], task, *shown, _changes(now, before)])
    return table(["trained", "optimizer", "pictures", "without SE", "SE now", "SE before", "now - before"], rows)


def _best(by_rate: list[dict[str, list[float]]], name: str) -> list[float]:
    return max((found[name] for found in by_rate), key=lambda levels: fmean(levels) if levels else 0.0)


def _changes(now: list[list[float]], before: list[list[float]]) -> str:
    """The differences, for each reduction, where both have been run with the same seeds."""
    pairs = [
        list(zip(*pair, strict=True)) if len(pair[0]) == len(pair[1]) else [] for pair in zip(now, before, strict=True)
    ]
    return " / ".join(str(Difference.of([x - y for x, y in pair])) if pair else "" for pair in pairs)


def _levels(bench: RealBench, optimizer: str, scope: str, task: str, lr: float) -> dict[str, list[float]]:
    """The accuracies of each seed that has been run, in percent."""
    found: dict[str, list[float]] = {}
    for seed in range(GRID_SEEDS):
        for name, tuning in grid(optimizer, scope, task, lr, seed).items():
            found.setdefault(name, []).extend(_present(bench, tuning))
    return found


def _present(bench: RealBench, tuning: Any) -> Iterator[float]:
    try:
        yield 100 * bench.run(tuning)["accuracy"]
    except Missing:
        return


def _spread(levels: list[float]) -> str:
    """The mean and, of several, the lowest."""
    if not levels:
        return ""
    return f"{fmean(levels):.0f}" + (f" ({min(levels):.0f})" if len(levels) > 1 else "")
