"""Keeping up with a block: generated code holds for the block as it was and for calls like the rehearsed one. Where an
attribute has changed since, or a call comes that would go another way, the block is read anew.
"""

from __future__ import annotations

from typing import Any

import torch

from .derived import RetrofittedBlock, derive_class, subclass
from .errors import RetrofitError
from .generation import rewritten
from .placement import Spot, survey
from .reading import Reading, read
from .rehearsal import rehearse_call
from .removal import strip
from .tracing import TraceFailure

__all__ = ["go_another_way", "mark_changed"]

_changed: dict[type, type] = {}


def mark_changed(block: RetrofittedBlock) -> None:
    """Give a block the class whose forward first reads the block anew."""
    cls = type(block)
    if cls not in _changed:
        key = (cls.se_base, cls.se_source, cls.se_names, cls.se_how, cls.se_kind, cls.se_placement)
        _changed[cls] = subclass(cls.se_base, {"forward": _read_anew}, key)
        _changed[_changed[cls]] = _changed[cls]
    object.__setattr__(block, "__class__", _changed[cls])


def _read_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block one of whose attributes has changed since its code was generated."""
    _take(self, _source_of_changed(self, args, kwargs))
    return self.forward(*args, **kwargs)


def _take(block: Any, source: str) -> None:
    cls = type(block)
    derived = derive_class(cls.se_base, source, cls.se_names, "rewrite", cls.se_kind, cls.se_placement)
    object.__setattr__(block, "__class__", derived)


_sources: dict[tuple[Any, ...], str] = {}  # by class and way of calling it


def go_another_way(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        raise RetrofitError(
            f"a {type(block).se_base.__name__} is called in a way in which it was not called before: run the model once on "
            "such an input, then compile it"
        )
    if block.__dict__.get("_se_on_another_way"):
        raise RetrofitError(
            f"a {type(block).se_base.__name__} decides in its forward by something that only a real run shows (a device, say), "
            "so its retrofitted forward can't follow it. Undo with remove_se, and leave the block out with exclude"
        )
    key = (type(block), block.training, *_likeness(args), *_likeness(sorted(kwargs.items())))
    if key not in _sources:
        _sources[key] = _source_of_changed(block, args, kwargs)
    _take(block, _sources[key])
    block.__dict__["_se_on_another_way"] = True
    try:
        return block.forward(*args, **kwargs)
    finally:
        del block.__dict__["_se_on_another_way"]


def _likeness(value: Any) -> tuple[Any, ...]:
    """What of a call's arguments its way can depend on."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_likeness, value))
    return (repr(value),)


def _source_of_changed(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    cls = type(block)
    ses = [getattr(block, name) for name in cls.se_names]
    rehearsal = rehearse_call(block, args, kwargs, prepare=strip)
    network = read(rehearsal)
    reading = next((r for r in network.readings if r.call is rehearsal.root), None)
    found = survey(network, cls.se_placement)
    spots = [spot for spot in found.spots if spot.reading is reading]
    if reading is not None and not spots and cls.se_kind == "rep-sum":
        spots = _fused_sum(reading)
    if reading is None or [spot.channels for spot in spots] != [se.channel for se in ses]:
        raise RetrofitError(
            f"a {cls.se_base.__name__} was changed after its retrofit, and SE does not fit into what it is now. Undo with "
            "remove_se, make the change, then call add_se"
        )
    try:
        return rewritten(
            rehearsal.ghosts,
            [rehearsal.root],
            {rehearsal.root: reading.block},
            {rehearsal.root: spots},
            list(cls.se_names),
        )
    except TraceFailure as failure:
        raise RetrofitError(f"a {cls.se_base.__name__} was changed after its retrofit, and now {failure}") from failure


def _fused_sum(reading: Reading) -> list[Spot]:
    """The place of SE in a re-parameterised block, whose sum has become one conv: before the activation."""
    for node, op in reading.ops.items():
        if getattr(op, "conv", None) is not None and op.users and op.users[0].role in ("act", "pass"):
            return [Spot("", "rep-sum", reading, node, op)]
    return []
