"""The parts of an item or a batch of data: inputs, and labels if any, as pairs or under the usual keys of dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import RetrofitError

# The usual names, including those of Hugging Face data sets, of its models' arguments, and of MONAI
INPUTS = ("pixel_values", "image", "img", "images", "input", "inputs", "x")
LABELS = ("labels", "label", "target", "targets", "class", "fine_label", "y")
BATCH_SIZE = 32  # for a Dataset, which has none of its own


def keys_in(names: Iterable[str], keys: Sequence[str] = ()) -> tuple[str, str | None]:
    """Return the keys of inputs and labels (None if there are none): those given, or the usual ones among the names."""
    names = list(names)
    there = f"the data's dicts have the keys {', '.join(map(str, names))}"
    if missing := [key for key in keys if key not in names]:
        raise RetrofitError(f"{there}, and not {' and '.join(missing)}")
    inputs, labels = (next((key for key in usual if key in names), None) for usual in (INPUTS, LABELS))
    if len(keys) == 2:
        inputs, labels = keys
    if inputs is None:
        raise RetrofitError(f'{there}: say which are image and class, such as keys=("image", "label")')
    return inputs, labels


def label_column(data: Any, keys: Sequence[str] = ()) -> str | None:
    """Return the labels' column of a Hugging Face data set; None for other data, and if its items have other keys."""
    columns = getattr(data, "features", None)
    try:
        return keys_in(columns, keys)[1] if isinstance(columns, dict) else None
    except RetrofitError:
        return None


def fields_of(item: Any, keys: Sequence[str] = ()) -> Sequence[Any]:
    """Return the inputs of an item or a batch and what follows them: its parts in order, or by the keys of a dict."""
    if isinstance(item, Mapping):
        return [item[key] for key in keys_in(item, keys) if key is not None]
    return item if isinstance(item, (tuple, list)) and item else (item,)
