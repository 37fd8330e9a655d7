"""Blocks that something bypasses: residual units, split units, dense layers, dual paths."""

from __future__ import annotations

from .blocks import (
    TRANSPARENT,
    FoundBlock,
    bypass_source,
    common_source,
    escapes,
    has_nonlinearity,
    has_spatial_conv,
    joins_channels,
    resizes,
)
from .branches import rep_sum
from .operations import is_conv_or_linear
from .record import Call, Op, Record

__all__ = ["dense_layers", "dual_path", "residual_unit", "split_unit"]


def residual_unit(record: Record, call: Call, add: Op) -> FoundBlock | None:
    if add.role != "add" or len(add.data) != 2 or len(add.takes) != 2:
        return None
    if add.data[0].shape != add.data[1].shape:
        return None  # an embedding, say, that is the same all over the map
    for branch, skip in (add.data, add.data[::-1]):
        source = bypass_source(skip, call, branch.ancestors)
        if source is None:
            continue
        region = (branch.ancestors | branch.bit) & call.mask
        common = bool(source.bit & branch.ancestors)
        if common:
            region &= ~(source.ancestors | source.bit)
        ops = list(record.select(region))
        if not has_spatial_conv(ops) or not (has_nonlinearity(ops) or _is_plain_convolution(record, call, add, ops)):
            continue
        if escapes(record, call, [source] if common else call.inputs, {add}) and not _has_second_output(
            call, add, region
        ):
            continue
        if _is_query(source, region):
            continue
        if call.parent is None and any(map(resizes, ops)) and not _resized_between(source, skip):
            continue  # it goes down in resolution and comes up again: a skip between the levels of an hourglass
        return FoundBlock("residual", call, region, add, branch, skip, source)
    return None


def _has_second_output(call: Call, add: Op, region: int) -> bool:
    """Whether all that bypasses an add is a second output of the module, made in the branch (WaveNet's skip output)."""
    others = [output for output in call.outputs if output is not add]
    return (
        add in call.outputs
        and call.parent is not None
        and bool(others)
        and all(o.bit & region or (_all_from(o, region) and not o.ancestors & add.bit) for o in others)
    )


def _all_from(op: Op, region: int) -> bool:
    """Whether every operand of an operation is computed inside a region, so that none bypasses it (as in the concat of a dual path)."""
    return bool(op.data) and all((o.ancestors | o.bit) & region for o in op.data)


def _is_query(source: Op, region: int) -> bool:
    """Whether attention takes a value as its query: it is added to what attention makes of it, and bypasses no block."""
    users = [source]
    for op in users:
        users += [u for u in op.users if u.bit & region and u.role in ("affine", "pass", "shape")]
    return any(u.bit & region and u.role in ("other", "linear") and len(u.data) > 1 for op in users for u in op.users)


def _is_plain_convolution(record: Record, call: Call, add: Op, ops: list[Op]) -> bool:
    """Whether a linear branch is a branch all the same: a convolution beside the input itself. Several linear branches are
    a sum to be fused (see rep_sum); a lone depthwise convolution encodes positions."""
    mixing = any(op.spatial_conv and op.conv is not None and not op.conv.depthwise for op in ops)
    return mixing and not any(map(resizes, ops)) and rep_sum(record, call, add) is None


def _resized_between(source: Op, op: Op) -> bool:
    while op is not source and op.data:
        if resizes(op):
            return True
        op = op.data[0]
    return False


def split_unit(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """A cat of (part of) the input and new features that is what the module returns."""
    if not joins_channels(cat):
        return None
    if not _is_returned(call, cat):
        return _split_in_graph(record, call, cat) if call.parent is None else None
    # in a dual path block (DPN), part of the new features is added to the bypass and part of them is put beside it
    added = {o: other for o in cat.data if (other := _added_to_bypass(o, call)) is not None}
    new, bypassed = [], False
    for operand in cat.data:
        if operand in added:
            new.append(added[operand])
        elif bypass_source(operand, call, 0, projections=2 if added else 0) is not None:
            bypassed = True
        else:
            new.append(operand)
    if not bypassed or not new:
        return _split_inside(record, call, cat)
    if len(new) > 1:
        if any(a.bit & b.ancestors for a in new for b in new):
            return None  # they feed each other: see dense_layers
        common = common_source(record, call, new)  # they are pieces of one value
        if common is None or common.channels is None:
            return None
        new = [common]
    return _new_features(record, cat, new[0], call, 0)


def _is_returned(call: Call, cat: Op) -> bool:
    """Whether all that a module returns is this value, at most activated or in another shape."""
    for output in call.outputs:
        while output is not cat:
            if output.role not in (*TRANSPARENT, "act") or len(output.data) != 1 or not call.holds(output):
                return False
            output = output.data[0]
    return bool(call.outputs)


def _split_in_graph(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """The same in a graph that holds many blocks: a piece of a value, and what was made of another piece of it."""
    pieces = [o for o in cat.data if o.role == "part" and len(o.data) == 1]
    new = [o for o in cat.data if o not in pieces]
    if len(pieces) != 1 or len(new) != 1:
        return None
    whole = pieces[0].data[0]
    if not whole.bit & new[0].ancestors or escapes(record, call, [whole], {cat}):
        return None
    return _new_features(record, cat, new[0], call, whole.ancestors | whole.bit)


def _split_inside(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """The same where what is split is no input of the module, but a value that every way through the module passes."""
    whole = common_source(record, call, cat.data)
    if whole is None or escapes(record, call, call.inputs, {whole}):
        return None
    outside = whole.ancestors | whole.bit
    if whole in cat.data and any(map(is_conv_or_linear, record.select(outside & call.mask))):
        return None  # it is newly computed as well: a primary convolution and a cheap one (GhostNet)
    new = [o for o in cat.data if bypass_source(o, call, outside, projections=0) is None]
    if len(new) != 1 or len(new) == len(cat.data):
        return None
    return _new_features(record, cat, new[0], call, outside)


def _new_features(record: Record, cat: Op, new: Op, call: Call, outside: int) -> FoundBlock | None:
    region = (new.ancestors | new.bit) & call.mask & ~outside
    ops = list(record.select(region))
    if not has_spatial_conv(ops) or not has_nonlinearity(ops):
        return None
    return FoundBlock("dense", call, region, cat, new)


def dense_layers(record: Record, call: Call, cat: Op) -> list[FoundBlock]:
    """A cat of one value and of what several layers made of it, each of which read all that came before it (Huang et
    al., arXiv:1608.06993). Where each reads the one before it alone, it is one block of several branches instead."""
    if not joins_channels(cat) or len(cat.data) < 3:
        return []
    first, *new = cat.data
    seen = first.bit
    outside = first.ancestors | first.bit
    blocks: list[FoundBlock] = []
    for operand in new:
        region = (operand.ancestors | operand.bit) & call.mask & ~outside
        ops = list(record.select(region))
        reads_all = any(
            op.role == "cat" and all(i.bit & seen for i in op.data) and len(op.data) == len(blocks) + 1 for op in ops
        )
        if (blocks and not reads_all) or not has_spatial_conv(ops) or not has_nonlinearity(ops):
            return []
        blocks.append(FoundBlock("dense", call, region, cat, operand, layered=True))
        seen |= operand.bit
        outside |= region
    return blocks


def _added_to_bypass(op: Op, call: Call) -> Op | None:
    """The new one of the two operands of an add, if the other is a bypass."""
    if op.role != "add" or len(op.data) != 2 or not call.holds(op):
        return None
    new = [o for o in op.data if bypass_source(o, call, 0) is None]
    return new[0] if len(new) == 1 else None


def dual_path(record: Record, call: Call, joins: list[Op]) -> FoundBlock | None:
    """Several joins of one new value with what bypassed the block, which together are all that it returns (DPN)."""
    cut: set[Op] = set()
    new: list[Op] = []
    for join in joins:
        operands = join.data
        if join.role == "cat" and not joins_channels(join):
            continue
        bypass = [o for o in operands if bypass_source(o, call, 0, projections=1) is not None]
        rest = [o for o in operands if o not in bypass]
        if not bypass or len(rest) != 1:
            continue
        cut.add(join)
        new += rest
    if {join.role for join in cut} != {"add", "cat"} or escapes(record, call, call.inputs, cut):
        return None
    common = call.mask
    for op in new:
        common &= op.ancestors | op.bit
    candidates = [op for op in record.select(common) if op.channels is not None]
    if not candidates:
        return None
    branch = candidates[-1]
    region = (branch.ancestors | branch.bit) & call.mask
    if not has_spatial_conv(record.select(region)):
        return None
    return FoundBlock("dense", call, region, max(cut, key=lambda op: op.index), branch)
