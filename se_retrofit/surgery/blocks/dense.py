"""Blocks whose new features are concatenated with what bypassed them: dense layers, split units, dual paths."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import behind, is_conv_or_linear
from ..record.graph import Call, Op, Record
from .block import Block, Target
from .questions import (
    TRANSPARENT,
    bypass_source,
    common_source,
    escapes,
    has_nonlinearity,
    has_spatial_conv,
    joins_channels,
    next_after,
    own_operations,
    resizes,
)


def dense_layers(record: Record) -> Iterator[Block]:
    """A concat of a value and of the outputs of several layers, each of which takes everything before it (DenseNet,
    Huang et al., arXiv:1608.06993). If each takes only the previous output, it is one multi-branch block instead."""
    for call in reversed(record.calls):
        own = own_operations(record, call)
        for cat in reversed(own):  # the last concat of a dense block has all its layers
            yield from _layers(record, call, cat)
        grown = {cat: layer for cat in own if (layer := _appended(record, call, cat)) is not None}
        before = {operand for cat in grown for operand in cat.data}
        yield from (layer for cat, layer in grown.items() if cat in before or not grown.keys().isdisjoint(cat.data))


def _appended(record: Record, call: Call, cat: Op) -> Block | None:
    """Return the layer in ``x = cat([x, layer(x)])``. One such concat alone may be a convolution and a cheap one
    (GhostNet); in a dense block, one follows the other."""
    if not joins_channels(cat) or len(cat.data) != 2:
        return None
    for x, new in (cat.data, cat.data[::-1]):
        region = call.region(new, x.lineage)
        if x.bit & new.ancestors and _is_layer(list(record.select(region))):
            return _layer(call, region, new, cat)
    return None


def _layer(call: Call, region: int, new: Op, cat: Op) -> Block:
    child = call.child_with(new)  # a layer that is a module gets SE in that module
    return Block("dense", child if child is not None and child.shows(new) else call, region, new, cat)


def _layers(record: Record, call: Call, cat: Op) -> list[Block]:
    if not joins_channels(cat) or len(cat.data) < 3:
        return []
    first, *new = cat.data
    seen = first.bit
    outside = first.lineage
    blocks: list[Block] = []
    for operand in new:
        region = call.region(operand, outside)
        ops = list(record.select(region))
        concats = [op for op in ops if op.role == "cat" and len(op.data) == len(blocks) + 1]
        reads_all = any(all(i.bit & seen for i in op.data) for op in concats)
        if (blocks and not reads_all) or not _is_layer(ops):
            return []
        blocks.append(_layer(call, region, operand, cat))
        seen |= operand.bit
        outside |= region
    return blocks


def split_units(record: Record) -> Iterator[Block]:
    """A concat of (part of) the input and new features that the module returns (a dense layer that concatenates its own
    features; ShuffleNetV2's unit at stride 1, Ma et al., arXiv:1807.11164)."""
    for call in reversed(record.calls):
        for cat in own_operations(record, call):
            yield from _units(record, call, cat)


def _units(record: Record, call: Call, cat: Op) -> list[Block]:
    if not joins_channels(cat):
        return []
    returned = _is_returned(call, cat)
    if call.parent is not None and not returned:
        return []
    if _is_upsampled(cat):
        return []
    new = [o for o in cat.data if bypass_source(o, call, 0, projections=0) is None]
    if not returned or not new or len(new) == len(cat.data):
        return _split_inside(record, call, cat)
    if len(new) > 1:
        if any(a.bit & b.ancestors for a in new for b in new):
            return []  # they feed each other: see dense_layers
        common = common_source(record, call, new)  # they are pieces of one value
        if common is not None:
            new = [common] if common.channels is not None else []
    return [block for value in new for block in _new_features(record, cat, value, call, 0)]


def _is_upsampled(cat: Op) -> bool:
    """Return whether a lone concat is upsampled next: the skip at the lowest level of a U-Net."""
    following = next_after(cat, TRANSPARENT)
    return following is not None and resizes(following) and all(o.role != "cat" for o in cat.data)


def _is_returned(call: Call, cat: Op) -> bool:
    """Return whether a module returns only this value, possibly activated or in another shape."""
    return bool(call.outputs) and all(behind(output, (*TRANSPARENT, "act")) is cat for output in call.outputs)


def _split_inside(record: Record, call: Call, cat: Op) -> list[Block]:
    """Do the same if the split value is computed in the module, which must pass it; in a graph with many blocks, only
    that value must pass the concat."""
    whole = common_source(record, call, cat.data)
    if whole is None or escapes(record, call, [whole], {cat}):
        return []
    if call.parent is not None and escapes(record, call, call.inputs, {whole}):
        return []
    outside = whole.lineage
    if whole in cat.data and any(map(is_conv_or_linear, record.select(outside & call.mask))):
        return []  # it is newly computed as well: a primary convolution and a cheap one (GhostNet)
    new = [o for o in cat.data if bypass_source(o, call, outside, projections=0) is None]
    if len(new) != 1 or len(new) == len(cat.data):
        return []
    return _new_features(record, cat, new[0], call, outside)


def _new_features(record: Record, cat: Op, new: Op, call: Call, outside: int) -> list[Block]:
    region = call.region(new, outside)
    if not _is_layer(list(record.select(region))):
        return []
    return [Block("dense", call, region, new, cat)]


def _is_layer(ops: list[Op]) -> bool:
    """Return whether operations compute features at one resolution; down and up again is a skip between the levels of a
    U-Net (nested ones: Zhou et al., arXiv:1807.10165)."""
    return has_spatial_conv(ops) and has_nonlinearity(ops) and not any(map(resizes, ops))


def dual_paths(record: Record) -> Iterator[Block]:
    """Several joins of pieces of one new value with what bypassed the block, which together are its whole output; they may
    be concatenated in the end (DPN, Chen et al., arXiv:1707.01629)."""
    for call in reversed(record.calls):
        yield from _dual_path(record, call)


def _dual_path(record: Record, call: Call) -> Iterator[Block]:
    cut: set[Op] = set()
    new: list[Op] = []
    for join in own_operations(record, call):
        if join.role != "add" and not joins_channels(join):
            continue
        bypasses = [o for o in join.data if bypass_source(o, call, 0, projections=1) is not None]
        rest = [o for o in join.data if o not in bypasses and o not in cut]
        if bypasses and len(rest) == 1:
            cut.add(join)
            new += rest
    if {join.role for join in cut} != {"add", "cat"} or escapes(record, call, call.inputs, cut):
        return
    if any(join.ancestors & other.bit and other not in join.data for join in cut for other in cut):
        return  # one after the other: a block in which something else is joined, too
    branch = common_source(record, call, new)
    if branch is not None and branch.channels is not None and has_spatial_conv(record.select(call.region(branch))):
        last = max(cut, key=lambda op: op.index)
        yield Block("dense", call, call.region(branch), branch, last, target=Target(call, branch))
