"""The batches of the data given to gate statistics and folding, and a batch as a network takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .errors import extra
from .fields import BATCH_SIZE, fields_of


def inputs_and_labels(batch: Any, keys: Sequence[str] = ()) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of a batch, and its labels if they are class numbers."""
    inputs, *rest = fields_of(batch, keys)
    if not isinstance(inputs, Tensor):
        kind = type(inputs).__name__
        raise TypeError(f"a batch must be a tensor, a tuple or list beginning with one, or a dict of them, got {kind}")
    labels = rest[0] if rest else None
    if isinstance(labels, Tensor) and labels.shape == inputs.shape[:1] and not labels.is_floating_point():
        return inputs, labels
    return inputs, None


def as_taken_by(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return inputs on the device of a model's parameters and, if they are floating, in their dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    return inputs.to(like.device, like.dtype if inputs.is_floating_point() else None)


def batches_of(model: nn.Module, data: Any, keys: Sequence[str] = ()) -> Iterable[Any]:
    """Return the batches of a DataLoader or another iterable of batches as they are; or batches of 32 items of a Dataset or
    a list of pairs of an input and a number, whose PIL images are prepared as in the validation of ``finetune``."""
    if isinstance(data, (DataLoader, Mapping)) or not (isinstance(data, Dataset) or hasattr(data, "__getitem__")):
        return data
    from .finetune.data import gives_images

    if gives_images(data, keys):
        with extra("finetune"):
            from .finetune.config import FinetuneConfig
            from .finetune.transforms import prepared_batches
        return prepared_batches(model, data, FinetuneConfig(keys=tuple(keys)), print)
    labels = fields_of(data[0], keys)[1:2] if isinstance(data, (list, tuple)) and data else ()
    # a single number is the label of one item, and not of a batch
    of_items = any(isinstance(label, int) or getattr(label, "shape", None) == () for label in labels)
    return data if isinstance(data, (list, tuple)) and not of_items else DataLoader(data, BATCH_SIZE)
