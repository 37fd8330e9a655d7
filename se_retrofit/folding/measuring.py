"""Runs over data: a few batches, and the effect of a change on the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..batches import as_taken_by, batches_of, inputs_and_labels
from ..errors import RetrofitError
from ..surgery.record.inputs import tensors_in
from ..surgery.record.isolation import forked_randomness


@dataclass(frozen=True, eq=False)
class Labelled:
    """Inputs, and the class of each if the data has labels."""

    inputs: Tensor
    labels: Tensor | None


def first_batches(model: nn.Module, data: Any, keys: Sequence[str], most: int) -> list[Labelled]:
    """Return the first batches of a Dataset, a DataLoader or any iterable of batches, on the model's device."""
    if isinstance(data, (Tensor, str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(f"data must be a Dataset, a DataLoader or an iterable of batches, got {type(data).__name__}")
    found = []
    with forked_randomness():  # a DataLoader draws a seed for its workers
        for batch in islice(batches_of(model, data, keys), most):
            inputs, labels = inputs_and_labels(batch, keys)
            if len(inputs):
                given = as_taken_by(inputs, model)
                found.append(Labelled(given, None if labels is None else labels.to(given.device)))
    if not found:
        raise RetrofitError("the data yields no batch, so there are no gates to measure; give at least one batch")
    return found


def outputs_of(model: nn.Module, batch: Labelled) -> list[Tensor]:
    """Return all floating-point tensors that a model returns for a batch."""
    return [t.clone() for t in tensors_in(model(batch.inputs)) if t.is_floating_point()]


def relative_change(now: list[Tensor], before: list[Tensor]) -> float:
    """Return the norm of the difference of tensors, relative to the norm of ``before``."""
    if [t.shape for t in now] != [t.shape for t in before]:
        return float("inf")
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(now, before, strict=True))
    size = sum(float(b.double().square().sum()) for b in before)
    return (apart / size) ** 0.5 if size > 0 else apart**0.5


class Reference:
    """The current outputs of a network, for later comparison."""

    def __init__(self, model: nn.Module, batches: list[Labelled]) -> None:
        self.model = model
        self.batches = batches
        self.outputs = [outputs_of(model, batch) for batch in batches]
        if not any(self.outputs):
            raise RetrofitError(f"{type(model).__name__} returns no tensor of floating-point numbers to compare")
        if not all(t.isfinite().all() for found in self.outputs for t in found):
            raise RetrofitError("the model's outputs on the data are not finite, so nothing can be compared")
        if not any(bool(t.any()) for found in self.outputs for t in found):
            raise RetrofitError("the model's outputs on the data are all zero, so nothing can be compared")
        self.accuracy = self._accuracy(self.outputs)
        self.one_input = 1.001 / sum(len(batch.inputs) for batch in batches)  # its share of the accuracy, plus rounding

    def compare(self) -> tuple[float, float | None]:
        """Return how far the outputs are from those of the reference, relative to their norm, and the accuracy."""
        outputs = [outputs_of(self.model, batch) for batch in self.batches]
        flat = [[t for found in several for t in found] for several in (outputs, self.outputs)]
        return relative_change(flat[0], flat[1]), self._accuracy(outputs)

    def _accuracy(self, outputs: list[list[Tensor]]) -> float | None:
        right = count = 0
        for found, batch in zip(outputs, self.batches, strict=True):
            if batch.labels is None or not found or found[0].dim() != 2 or len(found[0]) != len(batch.labels):
                return None
            if found[0].shape[1] == 1:  # a single number names no class
                return None
            right += int((found[0].argmax(1) == batch.labels).sum())
            count += len(batch.labels)
        return right / count if count else None
