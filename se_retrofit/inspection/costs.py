"""What a retrofit costs in multiply-adds.

Counted are the multiply-adds of convolutions, linear layers and matrix products, by ``torch.utils.flop_counter`` on
meta tensors, as most of the field counts. SE's squeeze (an addition a value) and scale (a multiplication a value),
which such counts leave out, make one multiply-add a value; they are counted on their own, as are the passes over all values of
any other attention.
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
from .graphs import batch_size

__all__ = ["NOT_CALLED", "SiteCost", "human", "multiply_adds", "one_input", "resized", "site_costs"]


@dataclass(frozen=True)
class SiteCost:
    """Cost of one SE module for one input of the network, in multiply-adds: ``excitation``, its layers, and ``squeeze_scale``,
    its passes over all values, two of which make one for each value; ``shape`` of what it scales, without the batch. None where
    it can't be run without data."""

    excitation: int | None
    squeeze_scale: int | None
    shape: tuple[int, ...]


NOT_CALLED = SiteCost(None, None, ())


def site_costs(record: Record) -> dict[str, SiteCost]:
    """By path, the costs of the SE modules that were called, all of their calls together."""
    sites: dict[str, SiteCost] = {}
    batch = batch_size(record)
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
    """The multiply-adds of a call: of its layers, and of its passes over all values, each of which is half of one."""
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
    """Counts the operations that compute from, or to, as many values as a feature map has."""

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
    """Those of the whole network for one input, of one more run of the copy that was recorded; None where that can't be run to its
    end without data."""
    inputs = record.inputs
    with isolated(model), _disable_current_modes():
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
                record.model(*inputs.args, **inputs.kwargs)
        except (RuntimeError, NotImplementedError):
            return None  # the record may mix tensors of meta and of the CPU; a plain run not
    return counter.get_total_flops() // 2 // batch_size(record)


def one_input(record: Record) -> str:
    """One input of the network, in words: ``3x224x224``."""
    first = next(iter((*record.inputs.args, *record.inputs.kwargs.values())), None)
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], Tensor):
        return "x".join(map(str, first[0].shape))
    if not isinstance(first, Tensor):
        return "one"
    return "x".join(map(str, first.shape[1:] if first.dim() > 2 else first.shape))


def resized(record: Record) -> str | None:
    """What one input has become where it comes to the first convolution, if that is of another size: a detector resizes images."""
    given = next(iter(tensors_in((record.inputs.args, record.inputs.kwargs))), None)
    conv = next((op for op in record.ops if op.conv is not None and op.data), None)
    if given is None or conv is None or conv.conv is None:
        return None
    dims = len(conv.conv.kernel) + 1
    seen, before = tuple(conv.data[0].shape[-dims:]), tuple(given.shape[-dims:])
    return "x".join(map(str, seen)) if seen != before and seen[0] == before[0] else None


def human(number: int) -> str:
    """A count in four digits: ``4.089 G``."""
    exponent = min(int(math.log10(number) // 3), 4) if number >= 1000 else 0
    return f"{number / 1000**exponent:.4g} {' KMGT'[exponent]}".strip()
