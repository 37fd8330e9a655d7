"""Functions of the caller's that are called while a fine-tune is under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import brief

__all__ = ["Callback", "Callbacks", "Facts"]


@dataclass(frozen=True)
class Facts:
    """What a callback is told. It may look at all of it, the network included, and must leave it as it is.

    Attributes:
        model: the network that is trained, with its weights of now.
        tested: the network that is evaluated: the average of the weights with ``ema_decay``, else ``model``.
        epoch: the epoch that is under way or just over, from 1; 0 in the evaluation before training.
        epochs: how many there are to be.
        update: how often the weights have changed so far, earlier parts of a resumed run included.
        lr: the learning rate without the scales of SE and head.
        loss: the mean loss of the update, of this process, on the device (``loss.item()`` waits for it); None in other events.
        history: a row for each evaluation and finished epoch, as in ``metrics.jsonl``; the last is of this event.
        output_dir: the run's folder; None for none.
        rank: number of this process; 0 is the main one.
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
    """Functions that ``finetune`` calls with ``Facts``, one for each event. What they return is ignored; what they raise ends
    the run, and passes to the caller.

    In a run of several processes each of them calls its own; ``facts.rank == 0`` is the main one.

    Args:
        after_update: after each change of the weights.
        after_evaluation: after each evaluation on validation data, the one before training (epoch 0) included.
        after_epoch: after each epoch, once its checkpoint is written.
        after_training: at the end of a run that was not broken off, with the best weights in ``model``.

    Raises:
        TypeError: one of them can't be called.

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
