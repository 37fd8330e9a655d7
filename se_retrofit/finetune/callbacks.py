"""The caller's functions that are called during a fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import brief


@dataclass(frozen=True)
class Facts:
    """The state of a run, as passed to callbacks. They may read everything, the network included, but not change it.

    Attributes:
        model: the network being trained, with its current weights.
        tested: the network that is evaluated: the average of the weights with ``ema_decay``, otherwise ``model``.
        epoch: the current epoch, or the one that has just ended, from 1; 0 in the evaluation before training.
        epochs: the total number of epochs.
        update: the number of updates so far, including those before a run was resumed.
        lr: the learning rate, without the factors for SE and head.
        loss: the mean loss of the update in this process, on the device (``loss.item()`` waits for it); otherwise None.
        history: a row for each evaluation and finished epoch, as in ``metrics.jsonl``; the last one is for this event.
        output_dir: the run's folder; None if it has none.
        rank: the number of this process; 0 is the main one.
    """

    model: nn.Module
    tested: nn.Module
    epoch: int
    epochs: int
    update: int
    lr: float
    loss: Tensor | None
    history: tuple[Mapping[str, Any], ...]
    output_dir: Path | None
    rank: int


Callback = Callable[[Facts], object]


@dataclass(frozen=True)
class Callbacks:
    """Functions that ``finetune`` calls with ``Facts``, one for each event. Their return values are ignored; an
    exception ends the run and propagates to the caller.

    In a run with several processes, each process calls its own functions; ``facts.rank == 0`` is the main one.

    Args:
        after_update: called after each update of the weights.
        after_evaluation: called after each evaluation on validation data, including that before training (epoch 0).
        after_epoch: called after each epoch, once its checkpoint is written.
        after_training: called at the end of a run that was not interrupted, with the best weights in ``model``.

    Raises:
        TypeError: If one of them is not callable.

    Example:
        >>> from se_retrofit.finetune import Callbacks
        >>> epochs = []
        >>> callbacks = Callbacks(after_epoch=lambda facts: epochs.append(facts.history[-1]["train_loss"]))
    """

    after_update: Callback | None = None
    after_evaluation: Callback | None = None
    after_epoch: Callback | None = None
    after_training: Callback | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not callable(value):
                raise TypeError(f"{field.name} must be a function of the run's facts, got {brief(value)}")
