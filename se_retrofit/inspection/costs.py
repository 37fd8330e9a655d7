"""What a retrofit costs in multiply-adds.

Counted are the multiply-adds of convolutions, linear layers and matrix products, by ``torch.utils.flop_counter`` on
meta tensors, as most of the field counts. SE's squeeze (an addition a value) and scale (a multiplication a value),
which such counts leave out, make one multiply-add a value; they are counted on their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention import SEAttention, squeeze
from ..removal import strip
from ..rehearsal import rehearse_call
from .graphs import Inspection, batch_size

__all__ = ["Costs", "SiteCost", "costs"]


@dataclass(frozen=True)
class SiteCost:
    """Cost of one SE module for one input of the network, in multiply-adds: ``excitation``, its two linear layers, and
    ``squeeze_scale``, one for each value; ``shape`` of what it scales, without the batch."""

    excitation: int
    squeeze_scale: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """Cost of the whole network for one input, ``before`` and ``after``; None where the network can't be run to its end
    without data. ``inputs`` says what one input is."""

    before: int | None
    after: int | None
    sites: dict[str, SiteCost]
    inputs: str

    @property
    def squeeze_scale(self) -> int:
        """Multiply-adds of all squeezes and scales, which neither ``before`` nor ``after`` holds."""
        return sum(site.squeeze_scale for site in self.sites.values())


def costs(inspection: Inspection) -> Costs:
    """Count the multiply-adds of an inspected model, for one input of the kind that it was inspected with."""
    root = inspection.rehearsal.root
    batch = batch_size(root.args)
    sites: dict[str, SiteCost] = {}
    for call in root.walk():
        if isinstance(call.module, SEAttention):
            se, x = call.module, call.args[0]
            rows = squeeze(x, se.channel_dim).numel() // se.channel
            known = sites.get(call.path, SiteCost(0, 0, tuple(x.shape[1:])))
            sites[call.path] = SiteCost(
                known.excitation + rows * 2 * se.channel * se.hidden // batch,
                known.squeeze_scale + x.numel() // batch,
                known.shape,
            )
    before = after = None
    if inspection.rehearsal.broke_off is None:
        before = _count(inspection.model, root.args, root.kwargs, strip)
        after = _count(inspection.model, root.args, root.kwargs, None)
    return Costs(
        None if before is None else before // batch,
        None if after is None else after // batch,
        sites,
        _describe(root.args),
    )


def _count(model: nn.Module, args: Any, kwargs: Any, prepare: Callable[[nn.Module], None] | None) -> int | None:
    for context in (nullcontext(), torch.device("meta")):
        try:
            with context, FlopCounterMode(display=False) as counter:
                rehearse_call(model, args, kwargs, prepare)
            return counter.get_total_flops() // 2
        except (RuntimeError, NotImplementedError):
            continue
    return None


def _describe(args: tuple[Any, ...]) -> str:
    """One input, in words: ``3x224x224``."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
        return "x".join(map(str, first.shape)) if isinstance(first, Tensor) else "one"
    if not isinstance(first, Tensor):
        return "one"
    shape = first.shape[1:] if first.dim() > 2 else first.shape
    return "x".join(map(str, shape))


def human(number: int) -> str:
    """A count in four digits: ``4.089 G``."""
    exponent = min(int(math.log10(number) // 3), 4) if number >= 1000 else 0
    return f"{number / 1000**exponent:.4g} {' KMGT'[exponent]}".strip()
