"""The printed output of a run and the files that record it: a table, JSONL, pictures and gate statistics."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..attention import has_gates
from ..errors import RetrofitError
from ..inspection.gate_plots import plot_gates
from ..inspection.gates import GateLogger, saturation_limits
from ..paths import new_figure, save_figure
from ..saving.atomic import write_text
from ..surgery.splice.undo import is_retrofitted
from .data import Batch

METRICS, UPDATES, CURVES, GATES, HARDEST = "metrics.jsonl", "updates.jsonl", "curves.png", "gates.png", "hardest.png"
PLAIN_SECONDS = 15.0  # between two lines if there is no terminal for a progress bar
MANY = 0.1  # fraction of saturated gates from which a site is named

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
    """The log of the main process: a table with a progress bar, or lines now and then. Others only print warnings."""

    def __init__(
        self, output: Path | None, accelerator: Accelerator, *, quiet: bool = False, epochs: int = 0, updates: int = 0,
        best_metric: str | None = None,
    ) -> None:  # fmt: skip
        self.rank = accelerator.process_index
        self.output, self.epochs, self.updates = output if self.rank == 0 else None, epochs, updates
        measured = [] if best_metric is None else dict.fromkeys(["val_loss", "val_accuracy", f"val_{best_metric}"])
        memory = ["peak_memory_mb"] if accelerator.device.type == "cuda" else []
        self.columns = [
            "epoch", "train_loss", "train_accuracy", *measured, "lr", "images_per_second", "seconds", *memory
        ]  # fmt: skip
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet or self.rank > 0)
        self.bar: Progress | None = None
        self.shown = time.monotonic()

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

    def complain(self, batch: Batch) -> None:
        """Report the images of a batch that could not be read, in the process that loaded them."""
        for complaint in batch.complaints:
            said = f"skipped an image that can't be read: {complaint}"
            if self.rank == 0:
                self.note(said)
            else:
                print(f"process {self.rank}: {said}", file=sys.stderr)

    def resume(self, updates: int) -> None:
        """Truncate ``updates.jsonl`` to the updates that the checkpoint includes."""
        if self.output is None or (updates and not (self.output / UPDATES).exists()):
            return
        kept, path = [], self.output / UPDATES
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if updates else []:
            # skips a line that was being written when the run was killed
            with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
                kept += [line] if json.loads(line)["update"] <= updates else []
        write_text(path, "".join(f"{line}\n" for line in kept))

    def header(self) -> None:
        self.console.print(self._line(COLUMNS[column][0] for column in self.columns), markup=False, style="bold")

    def update(self, epoch: int, done: int, entry: dict[str, Any], accuracy: float) -> None:
        """Log the loss: in the progress bar (or a line), and in ``updates.jsonl``."""
        if self.output is not None:
            path = self.output / UPDATES
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise RetrofitError(
                    f"{path} can't be written: {error.strerror}; the last checkpoint is kept"
                ) from error
        speed = f"{entry['images_per_second']:,.0f} images/s"
        figures = f"loss {entry['loss']:.4f}  acc {accuracy:.2%}  lr {entry['lr']:.2e}  {speed}"
        where = f"epoch {epoch}/{self.epochs}"
        if self.bar is not None:
            self.bar.update(self.task, completed=entry["update"], description=where, figures=figures)
        elif time.monotonic() - self.shown > PLAIN_SECONDS and done < self.updates:
            self.shown = time.monotonic()
            self.note(f"{where}  update {done}/{self.updates}  {figures}")

    def row(self, row: dict[str, Any]) -> None:
        """Print a finished epoch as a row of the table."""
        self.shown = time.monotonic()
        values = ((row.get(column), COLUMNS[column][1]) for column in self.columns)
        self.note(self._line("" if value is None else format(value, form) for value, form in values))

    def _line(self, texts: Iterable[str]) -> str:
        widths = (max(len(COLUMNS[column][0]), 8) for column in self.columns)
        return "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True))

    def history(self, history: list[dict[str, Any]]) -> None:
        """Rewrite all rows, so that a kill never leaves an incomplete table."""
        if self.output is not None:
            write_text(self.output / METRICS, "".join(json.dumps(row) + "\n" for row in history))

    def pictures(self, history: list[dict[str, Any]], draw_hardest: Callable[[Path], None]) -> None:
        if self.output is not None:
            plot_curves(history, self.output / CURVES)
            epochs = {row["epoch"]: row["gates"] for row in history if row.get("gates")}
            if epochs:
                plot_gates(epochs, self.output / GATES)
            draw_hardest(self.output / HARDEST)


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss and accuracy over the epochs as a PNG."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 3.5)
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
    save_figure(figure, path)


def listening(model: nn.Module, wanted: bool = True) -> contextlib.AbstractContextManager[GateLogger | None]:
    """Return a context in which the gates of a network are recorded; it provides None if there are no gates."""
    gated = any(is_retrofitted(module) and has_gates(module) for module in model.modules())
    return GateLogger(model) if wanted and gated else contextlib.nullcontext()


def log_gates(gates: GateLogger, trackers: Sequence[Any], step: int) -> dict[str, dict[str, Any]]:
    """Send the gates to TensorBoard as histograms, if it tracks the run; return their quartiles for the epoch's row."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            gates.write(tracker.writer, step)
    return {path: seen.quartiles() for path, seen in gates.summary().items()}


def saturated_sites(gates: GateLogger | None) -> dict[str, float]:
    """Return the sites with more than a tenth of their gates saturated, with that fraction."""
    summary = {} if gates is None else gates.summary()
    return {path: seen.saturated for path, seen in summary.items() if seen.saturated > MANY}


def news_of_saturation(model: nn.Module, history: Sequence[Mapping[str, Any]]) -> str:
    """Return a warning that names the sites first saturated in the last epoch; empty if there are none."""
    *before, row = history
    told = {path for earlier in before for path in earlier.get("saturated", {})}
    sites: dict[tuple[float, float], list[str]] = {}
    for path, share in row.get("saturated", {}).items():
        if path not in told:
            sites.setdefault(saturation_limits(model.get_submodule(path)), []).append(f"{path} ({share:.0%})")
    beyond = "; ".join(f"{', '.join(named)} below {low:g} or above {high:g}" for (low, high), named in sites.items())
    return f"gates are saturated, and hardly learn any more: {beyond}. Lower lr or se_lr_scale" if sites else ""
