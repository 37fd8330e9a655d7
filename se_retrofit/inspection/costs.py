"""The cost of a retrofit in multiply-adds.

The multiply-adds of convolutions, linear layers and matrix products are counted by ``torch.utils.flop_counter`` on meta
tensors, which is the usual convention. It leaves out SE's squeeze (an addition per value) and scale (a multiplication
per value), which make one multiply-add per value; they are counted separately, as are the passes of any other attention
over all values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ..surgery.record.copying import copied, on_meta
from ..surgery.record.graph import Op, Record
from ..surgery.record.inputs import tensors_in
from ..surgery.record.isolation import isolated
from ..surgery.splice.undo import is_retrofitted


@dataclass(frozen=True)
class SiteCost:
    """The cost of one SE module for one input of the network, in multiply-adds: ``excitation`` for its layers, and
    ``squeeze_scale`` for its passes over all values, two of which make one per value. They are None if the module can't
    be run without data. ``shape`` is that of the value that it scales, without the batch."""

    excitation: int | None
    squeeze_scale: int | None
    shape: tuple[int, ...]


NOT_CALLED = SiteCost(None, None, ())


def site_costs(record: Record) -> dict[str, SiteCost]:
    """Return the costs of the SE modules that were called, by path, summed over their calls."""
    sites: dict[str, SiteCost] = {}
    _, batch = one_input(record)
    for op in record.ops:
        if is_retrofitted(op.module) and op.path is not None:
            known = sites.get(op.path, SiteCost(0, 0, tuple(op.shape[1:])))
            layers, passes = _cost_of(op.module, op)
            sites[op.path] = SiteCost(
                None if layers is None or known.excitation is None else known.excitation + layers // batch,
                None if passes is None or known.squeeze_scale is None else known.squeeze_scale + passes // batch,
                known.shape,
            )
    return sites


def _cost_of(module: nn.Module, op: Op) -> tuple[int | None, int | None]:
    """Return the multiply-adds of a call: those of its layers, and half of one per value and pass over all values."""
    try:
        with _disable_current_modes(), torch.no_grad():
            copy = copied(module, on_meta, independent=True).eval()
            x = torch.empty(tuple(op.shape), dtype=op.dtype, device="meta")
            with FlopCounterMode(display=False) as counter, _Passes(x.numel()) as passes:
                copy(x)
    except (RuntimeError, NotImplementedError):
        return None, None
    return counter.get_total_flops() // 2, passes.count * x.numel() // 2


class _Passes(TorchDispatchMode):
    """Counts the operations whose input or output has as many values as a feature map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = func.is_view or func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy)
        full = any(t.numel() == self.size for t in tensors_in((args, result)))
        self.count += full and not moved
        return result


def multiply_adds(model: nn.Module, record: Record) -> int | None:
    """Return the multiply-adds of the whole network for one input, from another run of the recorded copy; None if that
    can't be run to the end without data."""
    inputs = record.inputs
    with isolated(model), _disable_current_modes():
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
                record.model(*inputs.args, **inputs.kwargs)
        except (RuntimeError, NotImplementedError):
            return None  # unlike the recorded run, a plain run can't mix meta and CPU tensors
    return counter.get_total_flops() // 2 // one_input(record)[1]


def one_input(record: Record) -> tuple[str, int]:
    """Describe one input of the network, ``3x224x224``, and return how many of them were recorded."""
    first = next(iter((*record.inputs.args, *record.inputs.kwargs.values())), None)
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], Tensor):  # images for a detector
        return "x".join(map(str, first[0].shape)), len(first)
    if not isinstance(first, Tensor):
        return "one", 1
    batched = first.dim() > 2
    return "x".join(map(str, first.shape[batched:])), int(first.shape[0]) if batched else 1


def resized(record: Record) -> str | None:
    """Describe the first convolution's input if its size differs from the network's input: detectors resize images."""
    given = next(iter(tensors_in((record.inputs.args, record.inputs.kwargs))), None)
    conv = next((op for op in record.ops if op.conv is not None and op.data), None)
    if given is None or conv is None or conv.conv is None:
        return None
    dims = len(conv.conv.kernel) + 1
    seen, before = tuple(conv.data[0].shape[-dims:]), tuple(given.shape[-dims:])
    return "x".join(map(str, seen)) if seen != before and seen[0] == before[0] else None


def human(number: int) -> str:
    """Format a count with four digits: ``4.089 G``."""
    exponent = min(int(math.log10(number) // 3), 4) if number >= 1000 else 0
    return f"{number / 1000**exponent:.4g} {' KMGT'[exponent]}".strip()
