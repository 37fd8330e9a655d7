"""What the gates did in each epoch: noted while the validation data are gone through, written beside the metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..attention import has_gates
from ..inspection.gate_log import GateLogger, plot_gates
from ..saving.atomic import replaced_file
from ..surgery.undo import is_retrofitted

__all__ = ["draw_gates", "listening", "log_gates"]


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
    return {path: seen.to_dict() for path, seen in gates.summary().items()}


def draw_gates(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The picture of all epochs; none where no epoch has gates."""
    epochs = {row["epoch"]: row["gates"] for row in history if row.get("gates")}
    if epochs:
        with replaced_file(path) as fresh:
            plot_gates(epochs, fresh)
