"""What a network's modules take, measured: milliseconds on its own device, and what autograd saves for the backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import RetrofitError
from ..surgery.record.copying import copied, has_values, in_mode, on_cpu, on_meta
from ..surgery.record.graph import Record
from ..surgery.record.inputs import Inputs
from ..surgery.record.isolation import forked_randomness, isolated
from .graphs import batch_size

__all__ = ["Measured", "Number", "measured", "watched"]

Number = TypeVar("Number", int, float)

_WARM_UP, _RUNS = 2, 5


@dataclass(frozen=True)
class Measured:
    """What modules take for one input, by path: ``milliseconds``, and ``saved_bytes`` or None where the network can't be
    run in train mode on these inputs. ``where`` says on what it was measured."""

    milliseconds: dict[str, float]
    saved_bytes: dict[str, int] | None
    where: str


def measured(model: nn.Module, record: Record) -> Measured:
    """Run copies of a recorded model again, and measure.

    Raises:
        RetrofitError: the model has no values to compute with.
    """
    like = next(model.parameters(), torch.empty(0))
    if not all(has_values(p) for p in model.parameters()):
        raise RetrofitError(
            f"{type(model).__name__} can't be measured: its parameters have no values (they are on the meta device or fake); "
            "build it with values, or leave out the measurement"
        )
    batch = batch_size(record)
    with isolated(model), _disable_current_modes(), forked_randomness():
        milliseconds = _milliseconds(model, record.inputs, like.device)
        saved = _saved_bytes(model, record.inputs)
    where = f"in batches of {batch}, {str(like.dtype).removeprefix('torch.')} on {like.device}"
    return Measured(
        {path: number / batch for path, number in milliseconds.items()},
        None if saved is None else {path: number // batch for path, number in saved.items()},
        where,
    )


def _milliseconds(model: nn.Module, inputs: Inputs, device: torch.device) -> dict[str, float]:
    """Those of the fastest of some runs in eval mode."""
    copy = in_mode(copied(model, independent=True), False)
    values = inputs.with_values(torch.Generator().manual_seed(0))
    values = copied(values, lambda tensor: tensor.to(device))

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1000

    runs = []
    with torch.no_grad():
        for number in range(_WARM_UP + _RUNS):
            sums: dict[str, float] = {}
            with watched(copy, now, lambda began: now() - began, sums):
                copy(*values.args, **values.kwargs)
            if number >= _WARM_UP:
                runs.append(sums)
    return min(runs, key=lambda sums: sums[""])


def _saved_bytes(model: nn.Module, inputs: Inputs) -> dict[str, int] | None:
    """The sizes of what is saved in train mode; it needs no values where the record needed none."""
    copy = in_mode(copied(model, on_meta if inputs.is_meta else on_cpu, independent=True), True)
    own = {_storage(t) for tensors in (copy.parameters(), copy.buffers()) for t in tensors}
    kept: list[Tensor] = []  # keys are of storages that live
    known: set[int] = set()
    total, sums = 0, dict[str, int]()

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        key = _storage(tensor)
        if key not in own and key not in known:
            known.add(key)
            kept.append(tensor.detach())
            total += tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    try:
        with torch.enable_grad(), hooks, watched(copy, lambda: total, lambda before: total - before, sums):
            copy(*inputs.args, **inputs.kwargs)
    except Exception:  # a detector wants targets, say
        return None
    return sums


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def watched(
    model: nn.Module, enter: Callable[[], Number], leave: Callable[[Number], Number], sums: dict[str, Number]
) -> Iterator[None]:
    """While it is active, add up by path what each call of a module takes: ``leave`` tells it from what ``enter`` gave. A call of
    a module inside of its own is a part of the outer one."""
    running: list[tuple[nn.Module, Number]] = []
    paths = {id(module): path for path, module in model.named_modules()}

    def begin(module: nn.Module, *_: Any) -> None:
        running.append((module, enter()))

    def end(module: nn.Module, *_: Any) -> None:
        while running:  # calls that raised, which the model's code has caught, end with the one around them
            last, began = running.pop()
            if last is module:
                break
        else:
            return
        if not any(outer is module for outer, _ in running):
            path = paths[id(module)]
            sums[path] = sums.get(path, type(began)(0)) + leave(began)

    # a script module takes no such hooks
    handles = [
        handle
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
