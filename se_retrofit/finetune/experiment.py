"""The identity of a run's experiment: the network and its initial weights, what ``add_se`` did, and the data.

A folder that holds one experiment must not be used for another, so its description is written with the checkpoint and
compared before a run is resumed. The config is compared separately, field by field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import RetrofitError
from ..models import Base
from ..retrofit import has_se, plan_of
from .data import UNREADABLE, name_of
from .randomness import SAMPLE, kept_randomness, seed_all

SAMPLES = 8  # items of a data set whose content is hashed
DIGITS = 16  # of a hash, in hexadecimal
SITE = ("path", "block", "kind", "after", "channels", "parameters", "channel_dim", "attention")  # not the edits


def describe_run(
    model: nn.Module,
    train_data: Any,
    val_data: Any,
    criterion: Any = None,
    teacher: nn.Module | None = None,
    distillation: tuple[float, float] = (0.5, 4.0),
) -> dict[str, Any]:
    """Describe an experiment except for its config, as plain data that is equal for equal experiments."""
    plan, base = plan_of(model) if has_se(model) else None, Base.noted(model)
    named = getattr(criterion, "__qualname__", type(criterion).__qualname__)
    described = {
        "network": type(model).__name__,
        "base": None if base is None else {"library": base.library, "name": base.name, "arguments": base.kwargs},
        "starting weights": weights_digest(model),
        "SE options": None if plan is None else dict(plan.options),
        "SE sites": None if plan is None else digest([{n: getattr(site, n) for n in SITE} for site in plan.sites]),
        "training data": describe_data(train_data),
        "validation data": None if val_data is None else describe_data(val_data),
        "criterion": None if criterion is None else named,
        "teacher": None,
    }
    if isinstance(criterion, nn.Module):
        described["criterion"] = f"{criterion} {weights_digest(criterion)}"
    if teacher is not None:
        described["teacher"] = {"weights": weights_digest(teacher), "distillation": distillation}
    return dict(plain(described))


def describe_data(data: Any) -> dict[str, Any]:
    """Return a fingerprint of data: length, classes, names of files, and the content of a few samples."""
    described: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        described["batch size"] = data.batch_size
        data = data.dataset
    try:
        length = len(data)
    except TypeError:
        length = None
    described["length"] = length
    classes = getattr(data, "classes", None)
    if isinstance(classes, (list, tuple)):
        described["classes"] = digest([str(name) for name in classes])
    if length and hasattr(data, "__getitem__"):
        if name_of(data, 0) != "item 0":
            # the last two parts of a path, CLASS/IMAGE, because the data may have been moved
            described["names"] = digest(["/".join(Path(name_of(data, at)).parts[-2:]) for at in range(length)])
        looked_at = sorted({number * length // SAMPLES for number in range(SAMPLES)})
        described["samples"] = digest([_content(data, at) for at in looked_at])
    return described


def _content(data: Any, index: int) -> str:
    """Return a hash of one item, or a remark if the item differs each time it is read."""
    found = []
    with kept_randomness():
        for _ in range(2):
            seed_all(0, SAMPLE, 0, index)
            try:
                found.append(_hash(data[index]))
            except (*UNREADABLE, RuntimeError):
                found.append("unreadable")
    return found[0] if found[0] == found[1] else "varies"


def _hash(value: Any) -> str:
    if isinstance(value, Mapping):
        return digest({str(key): _hash(entry) for key, entry in value.items()})
    if isinstance(value, (tuple, list)):
        return digest([_hash(entry) for entry in value])
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {_short(_raw(value))}"
    if isinstance(value, (Image.Image, np.ndarray)):
        pixels = np.asarray(value)
        return f"{pixels.dtype} {pixels.shape} {_short(pixels.tobytes())}"
    return str(value) if isinstance(value, (bool, int, float, str, np.number)) else type(value).__name__


def weights_digest(model: nn.Module) -> str:
    """Return a hash of the state dict: names, shapes and bits."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):  # not the result of get_extra_state
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(_raw(value))
    return total.hexdigest()[:DIGITS]


def _raw(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def file_digest(file: Path) -> str:
    try:
        return _short(file.read_bytes())
    except OSError as error:
        raise RetrofitError(f"{file} can't be read: {error.strerror or error}") from error


def digest(value: Any) -> str:
    """Return a short hash of plain data."""
    return _short(json.dumps(value, sort_keys=True, default=str).encode())


def plain(value: Any) -> Any:
    """Return ``value`` as it would be after a round trip through JSON, with lists in place of tuples."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between two descriptions, one text for each field that differs."""
    texts = []
    for field in [*now, *sorted(saved.keys() - now.keys())]:
        before, after = saved.get(field), now.get(field)
        if isinstance(before, dict) and isinstance(after, dict):
            texts += [f"{field}, {text}" for text in changes(before, after)]
        elif before != after:
            texts.append(f"{field}: {before!r} then, {after!r} now")
    return texts


def check_same(saved: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raise an error if a folder holds another experiment."""
    differs = changes(saved, now)
    if not differs:
        return
    hint = ""
    if any(text.startswith("starting weights") for text in differs):
        hint = "; random weights are the same again only if torch.manual_seed is called before the network is built"
    raise RetrofitError(
        f"{output} holds a run of another experiment ({'; '.join(differs)}); resume with the same network and data, "
        f"or give a new folder{hint}"
    )
