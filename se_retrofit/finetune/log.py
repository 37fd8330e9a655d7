"""What a person sees of a run, and the files that tell of it: a table, JSONL, CSV and a plot."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import RetrofitError
from ..saving.atomic import replaced_file
from .config import FinetuneConfig
from .data import Batch
from .gates import draw_gates
from .result import FinetuneResult

__all__ = ["Log", "plot_curves"]

METRICS, CSV, UPDATES = "metrics.jsonl", "metrics.csv", "updates.jsonl"
CURVES, GATES = "curves.png", "gates.png"
PLAIN_SECONDS = 15.0  # between two lines where there is no terminal to draw a bar in

COLUMNS = {
    "epoch": ("epoch", "d"),
    "train_loss": ("train loss", ".4f"),
    "train_accuracy": ("train acc", ".2%"),
    "val_loss": ("val loss", ".4f"),
    "val_accuracy": ("val acc", ".2%"),
    "val_top5": ("val top-5", ".2%"),
    "val_precision": ("val prec", ".2%"),
    "val_recall": ("val recall", ".2%"),
    "val_f1": ("val F1", ".2%"),
    "val_map": ("val mAP", ".2%"),
    "lr": ("lr", ".2e"),
    "images_per_second": ("images/s", ",.0f"),
    "seconds": ("seconds", ",.1f"),
    "peak_memory_mb": ("GPU MiB", ",.0f"),
}


class Log:
    """Prints and writes for the main process; of the others only warnings are heard.

    In a terminal it draws a progress bar under the table; elsewhere it prints a line now and then.
    """

    def __init__(
        self, output: Path | None, *, epochs: int, updates: int, columns: list[str], rank: int = 0, quiet: bool = False
    ) -> None:
        self.output, self.epochs, self.updates, self.rank = output, epochs, updates, rank
        self.columns = columns
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet or rank > 0)
        self.bar: Progress | None = None
        self.shown = time.monotonic()

    @classmethod
    def of(
        cls,
        output: str | Path | None,
        config: FinetuneConfig,
        batches: int,
        validates: bool,
        accelerator: Accelerator,
        quiet: bool,
    ) -> Log:
        """The log of a run, with the columns that it has."""
        chosen_by = [f"val_{config.best_metric}"] if config.best_metric not in ("loss", "accuracy") else []
        measured = ["val_loss", "val_accuracy", *chosen_by] if validates else []
        memory = ["peak_memory_mb"] if accelerator.device.type == "cuda" else []
        columns = ["epoch", "train_loss", "train_accuracy", *measured, "lr", "images_per_second", "seconds", *memory]
        updates, folder = math.ceil(batches / config.grad_accum_steps), None if output is None else Path(output)
        return cls(
            folder, epochs=config.epochs, updates=updates, columns=columns, rank=accelerator.process_index, quiet=quiet
        )

    def __enter__(self) -> Log:
        if self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.epochs * self.updates, figures="")
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """What only this process knows."""
        if self.rank == 0:
            self.note(text)
        else:
            print(f"process {self.rank}: {text}", file=sys.stderr)

    def complain(self, batch: Batch) -> None:
        """Name the images of a batch that could not be read."""
        for complaint in batch.complaints:
            self.warn(f"skipped an image that can't be read: {complaint}")

    def resume(self, updates: int) -> None:
        """Cut ``updates.jsonl`` back to what the checkpoint knows of."""
        path = self._file(UPDATES)
        if path is None or (updates and not path.exists()):
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if updates else []:
            try:
                if json.loads(line)["update"] <= updates:
                    kept.append(line)
            except (KeyError, RecursionError, TypeError, ValueError):
                continue  # the line that was being written when the run was killed
        with replaced_file(path) as fresh:
            fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def header(self) -> None:
        names = [COLUMNS[c][0] for c in self.columns]
        self.console.print("  ".join(name.rjust(_width(name)) for name in names), markup=False, style="bold")

    def update(self, epoch: int, done: int, entry: dict[str, Any], accuracy: float) -> None:
        """One look at the loss: onto the bar (or a line), and into ``updates.jsonl``."""
        path = self._file(UPDATES)
        if path is not None:
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise RetrofitError(
                    f"{path} can't be written: {error.strerror}; the last checkpoint is kept"
                ) from error
        speed = f"{entry['images_per_second']:,.0f} images/s"
        figures = f"loss {entry['loss']:.4f}  acc {accuracy:.2%}  lr {entry['lr']:.2e}  {speed}"
        if self.bar is not None:
            where = f"epoch {epoch}/{self.epochs}"
            self.bar.update(self.task, completed=entry["update"], description=where, figures=figures)
        elif time.monotonic() - self.shown > PLAIN_SECONDS and done < self.updates:
            self.shown = time.monotonic()
            self.console.print(f"epoch {epoch}/{self.epochs}  update {done}/{self.updates}  {figures}", markup=False)

    def row(self, row: dict[str, Any]) -> None:
        """A finished epoch, as a row of the table."""
        self.shown = time.monotonic()
        cells = []
        for column in self.columns:
            name, form = COLUMNS[column]
            value = row.get(column)
            cells.append(("" if value is None else format(value, form)).rjust(_width(name)))
        self.console.print("  ".join(cells), markup=False)

    def history(self, history: list[dict[str, Any]]) -> None:
        """Write all rows anew: a file that is cut short by a kill would be no table."""
        metrics, table = self._file(METRICS), self._file(CSV)
        if metrics is None or table is None:
            return
        with replaced_file(metrics) as fresh:
            fresh.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
        with replaced_file(table) as fresh, fresh.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(history)

    def pictures(self, history: list[dict[str, Any]]) -> None:
        curves, gates = self._file(CURVES), self._file(GATES)
        if curves is not None and gates is not None:
            plot_curves(history, curves)
            draw_gates(history, gates)

    def summarise(self, result: FinetuneResult) -> None:
        """The last lines: how good it became, and where it is."""
        if result.best_accuracy is not None:
            first = result.history[0].get("val_accuracy") if result.history[0]["epoch"] == 0 else None
            before = f" (before training {first:.2%})" if first is not None else ""
            self.note(f"best validation accuracy {result.best_accuracy:.2%} in epoch {result.best_epoch}{before}")
        if result.stopped == "early stop":
            self.note(f"stopped early, after epoch {result.history[-1]['epoch']}")
        if result.directory is not None:
            self.note(f"result: {result.directory} (load_retrofitted), curves and metrics beside it")

    def _file(self, name: str) -> Path | None:
        return self.output / name if self.output is not None and self.rank == 0 else None


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and needed once
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "val"):
            points = [(row["epoch"], row[f"{part}_{what}"]) for row in history if row.get(f"{part}_{what}") is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=part)
                axes.legend()
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    with replaced_file(path) as fresh:
        figure.savefig(fresh, dpi=120)


def _width(name: str) -> int:
    return max(len(name), 8)
