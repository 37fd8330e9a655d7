"""What a fine-tune came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..tables import as_html

__all__ = ["FinetuneResult"]


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune came to.

    Attributes:
        model: the network that was given, with the weights of the best epoch (the last, without validation data).
        history: a row for each epoch, as in ``metrics.jsonl``; row 0 is the evaluation before any step.
        best_epoch: the epoch that was best by the config's ``best_metric``, from 1; None without validation data.
        best_score: the value of that metric then.
        best_accuracy: the validation accuracy then.
        stopped: ``"epochs"`` when all were run, ``"early stop"`` when it no longer became better.
        directory: ``output_dir/best``, which ``load_retrofitted`` loads; None where nothing was written.
        updates: how often the weights changed.
        step_seconds: median time of an update, loading included; None for runs too short to tell.
        parameters: of the network.
        trained_parameters: those of them that were trained in the end.
        groups: of the optimizer: name, part of the learning rate, weight decay and number of tensors of each.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best_accuracy: float | None
    best_score: float | None
    best_epoch: int | None
    stopped: str
    directory: Path | None
    updates: int
    step_seconds: float | None
    parameters: int
    trained_parameters: int
    groups: list[dict[str, Any]]

    def _repr_html_(self) -> str:
        names = list(
            dict.fromkeys(k for row in self.history for k, value in row.items() if isinstance(value, (int, float)))
        )
        rows = [["" if name not in row else f"{row[name]:.4g}" for name in names] for row in self.history]
        best = f"best epoch {self.best_epoch}: {self.best_score:.4f}" if self.best_score is not None else ""
        return as_html([names, *rows], left=0, above=f"{type(self.model).__name__}, fine-tuned", below=[best])
