"""What the gates did in each epoch: noted while the validation data are gone through, written beside the metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..attention import has_gates
from ..inspection.gate_plots import plot_gates
from ..inspection.gates import GateLogger, saturation_limits
from ..saving.atomic import replaced_file
from ..surgery.splice.undo import is_retrofitted

__all__ = ["draw_gates", "listening", "log_gates", "news_of_saturation", "saturated_sites"]

MANY = 0.1  # of a site's gates that are saturated: it is named


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[GateLogger | None]:
    """Gather the gates of a network while it is evaluated; None where it has none."""
    if not any(is_retrofitted(module) and has_gates(module) for module in model.modules()):
        yield None
        return
    with GateLogger(model) as gates:
        yield gates


def log_gates(gates: GateLogger, trackers: Sequence[Any], step: int) -> dict[str, dict[str, Any]]:
    """Send the gates to TensorBoard, where it tracks the run, as histograms; what is left is for the row of the epoch."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            gates.write(tracker.writer, step)
    return {path: seen.quartiles() for path, seen in gates.summary().items()}


def draw_gates(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The picture of all epochs; none where no epoch has gates."""
    epochs = {row["epoch"]: row["gates"] for row in history if row.get("gates")}
    if epochs:
        with replaced_file(path) as fresh:
            plot_gates(epochs, fresh)


def saturated_sites(gates: GateLogger | None) -> dict[str, float]:
    """The sites of which more than a tenth of the gates are saturated, with that share."""
    summary = {} if gates is None else gates.summary()
    return {path: seen.saturated for path, seen in summary.items() if seen.saturated > MANY}


def news_of_saturation(model: nn.Module, history: Sequence[Mapping[str, Any]]) -> str:
    """A warning that names the sites that are saturated in the last epoch and were in none before; empty where none are."""
    *before, row = history
    told = {path for earlier in before for path in earlier.get("saturated", {})}
    sites: dict[tuple[float, float], list[str]] = {}
    for path, share in row.get("saturated", {}).items():
        if path not in told:
            sites.setdefault(saturation_limits(model.get_submodule(path)), []).append(f"{path} ({share:.0%})")
    beyond = "; ".join(f"{', '.join(named)} below {low:g} or above {high:g}" for (low, high), named in sites.items())
    return f"gates are saturated, and hardly learn any more: {beyond}. Lower lr or se_lr_scale" if sites else ""
