"""Residual units."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.graph import Call, Op, Record
from .block import Block
from .inverted import core_of
from .questions import bypass_source, edge, escapes, has_nonlinearity, has_spatial_conv, own_operations, resizes
from .rep_sum import is_rep_sum

__all__ = ["residual_units"]


def residual_units(record: Record) -> Iterator[Block]:
    """An add of a branch and a skip (the block's input, or a projection of it) that every way to the output passes (He et
    al., arXiv:1512.03385; with SE: Hu et al., arXiv:1709.01507, section 3.3). One whose branch is the core of an inverted
    bottleneck is of that kind (Sandler et al., arXiv:1801.04381)."""
    for call in reversed(record.calls):
        for add in own_operations(record, call):
            block = _unit(record, call, add)
            if block is None:
                continue
            core = core_of(record, block)
            if core is not None:
                block.kind, block.target = "inverted", edge(record, core.value, core.taker)
            yield block


def _unit(record: Record, call: Call, add: Op) -> Block | None:
    if add.role != "add" or len(add.data) != 2 or len(add.takes) != 2:
        return None
    if add.data[0].shape != add.data[1].shape:
        return None  # an embedding, say, that is the same all over the map
    pairs = (add.data, add.data[::-1])
    for branch, skip in sorted(pairs, key=lambda pair: not pair[1].bit & pair[0].ancestors):  # an identity skip first
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
        return Block("residual", call, region, branch, add, skip, source)
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
    return mixing and not any(map(resizes, ops)) and not is_rep_sum(record, call, add)


def _resized_between(source: Op, op: Op) -> bool:
    while op is not source and op.data:
        if resizes(op):
            return True
        op = op.data[0]
    return False
