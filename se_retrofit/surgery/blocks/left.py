"""The spatial convolutions that get no SE, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...plan import Skipped
from ..record.graph import Op, Record
from .block import Found, Place
from .chains import covers_its_input, is_feature, tells_where
from .names import path_of
from .questions import TRANSPARENT, next_after


def left_out(
    record: Record, training: Record | None, found: Found, placed: Sequence[Place], everything: bool
) -> tuple[Skipped, ...]:
    """Return the blocks, and the convolutions outside all blocks, that get no SE, in order of execution.

    Args:
        record, training: the records of the network in eval mode, and in train mode if there is one.
        found: its blocks; those that were left out since are in ``skipped``.
        placed: the places that get SE.
        everything: whether to include convolutions outside all blocks.
    """
    served: set[str] = set()
    for place in placed:
        served.update(_convolutions(record, place.region))
    left = {}
    for block, reason in found.skipped.items():
        own = dict.fromkeys(path for path in _convolutions(record, found.regions.get(block, 0)) if path not in served)
        left[block] = Skipped(block, reason, tuple(own))
    listed = served.union(*(skip.convolutions for skip in left.values()))
    inside = 0
    for region in (*(place.region for place in placed), *found.regions.values()):
        inside |= region
    for op in record.ops if everything else ():
        beside = op.conv is not None and op.conv.spatial and (op.spatial_conv or not op.bit & inside)
        if beside and (path := _path_of(op)) not in listed:
            listed.add(path)
            left.setdefault(path, Skipped(path, _why_in_no_block(op, found), (path,)))
            found.regions.setdefault(path, op.bit)
    order = {block: found.regions.get(block, 0) & -found.regions.get(block, 0) for block in left}
    ordered = sorted(left, key=lambda block: order[block] or 1 << len(record.ops))
    more = _not_evaluated(record, training) if everything else {}
    return (*(left[block] for block in ordered), *(Skipped(path, reason, (path,)) for path, reason in more.items()))


def _not_evaluated(record: Record, training: Record | None) -> dict[str, str]:
    """Return the spatial convolutions that did not run in eval mode, and why they get no SE."""
    trained = [] if training is None else training.ops
    found = {_path_of(op): "it runs in train mode alone" for op in trained if op.conv is not None and op.conv.spatial}
    used = {op.path for op in (*record.ops, *trained)}
    for path, module in record.model.named_modules():
        spatial = isinstance(module, nn.modules.conv._ConvNd) and any(k > 1 for k in module.kernel_size)
        if spatial and used.isdisjoint((path, f"{path}.weight")):
            found.setdefault(path, "no recorded call runs it: give example_inputs with which one does")
    run = {_path_of(op) for op in record.ops if op.conv is not None}
    return {path: reason for path, reason in found.items() if path not in run}


def _convolutions(record: Record, region: int) -> list[str]:
    return [_path_of(op) for op in record.select(region) if op.spatial_conv]


def _path_of(conv: Op) -> str:
    return path_of(conv) or conv.name


def _why_in_no_block(conv: Op, found: Found) -> str:
    if conv.flat:
        return "it runs over what was pooled, not over space"
    if covers_its_input(conv):
        return "its kernel covers its whole input: a fully-connected layer"
    if tells_where(conv):
        return "another value is sampled by its output: a prediction"
    if not is_feature(conv, pooled=True):
        return "no learned layer takes its output: a prediction, or not used"
    if conv.bit & found.shortcuts:
        return "it is on the shortcut of a unit"
    following = next_after(conv, TRANSPARENT)
    if following is not None and following.role in ("add", "mul"):
        return f"it has no non-linearity, and is a part of {'an addition' if following.role == 'add' else 'a product'}"
    return "it has no non-linearity, and is in no block"
