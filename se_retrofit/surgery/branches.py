"""Blocks that nothing bypasses: branches that are joined, sums that are one convolution in disguise, plain chains."""

from __future__ import annotations

from collections.abc import Iterator

from .blocks import (
    FoundBlock,
    common_prefix,
    common_source,
    escapes,
    has_nonlinearity,
    has_spatial_conv,
    is_pointwise,
    joins_channels,
    next_after,
    resizes,
)
from .operations import only_user, real_users
from .record import Call, Op, Record

__all__ = ["chain_units", "is_prediction", "multi_branch", "rep_sum"]


def multi_branch(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """A channel cat of branches that come from one value; SE goes behind it, or behind the conv that fuses it."""
    if not joins_channels(cat):
        return None
    source = common_source(record, call, cat.data)
    if escapes(record, call, [source] if source is not None else call.inputs, {cat}):
        return None
    block = _branches_from(record, call, cat, source)
    if (
        block is None
        and source is not None
        and call.parent is not None
        and not escapes(record, call, call.inputs, {cat})
    ):
        # what the branches have in common belongs to the block itself, with what is made of it and the conv that fuses all
        block = _branches_from(record, call, cat, None)
        if block is not None and (block.branch is cat or not call.holds(block.branch)):
            return None
    return block


def _branches_from(record: Record, call: Call, cat: Op, source: Op | None) -> FoundBlock | None:
    outside = (source.ancestors | source.bit) if source is not None else 0
    ops = list(record.select(cat.ancestors & call.mask & ~outside))
    if not has_spatial_conv(ops) or any(map(resizes, ops)):
        return None
    convolved = [
        o
        for o in cat.data
        if any(p.conv is not None for p in record.select((o.ancestors | o.bit) & call.mask & ~outside))
    ]
    bypasses = [
        o for o in cat.data if o not in convolved and not (o.role == "pool" and call.holds(o) and not o.bit & outside)
    ]
    end = _fusing_end(call, cat, ops)
    if len(convolved) < 2 or (bypasses and end is None):
        return None
    end = end or cat
    region = (end.ancestors | end.bit) & call.mask & ~outside
    return FoundBlock("multi-branch", call, region, cat, end)


def _fusing_end(call: Call, cat: Op, branches: list[Op]) -> Op | None:
    """Behind a cat: the last value of the pointwise conv that fuses it, with its norm and activation."""
    op, conv = cat, None
    while True:
        user = only_user(op)
        if user is None or not call.holds(user) or len(user.data) != 1:
            break
        if user.conv is not None and not user.conv.spatial:
            conv = conv or user
        elif user.role not in ("norm", "act", "pass", "affine"):
            break
        op = user
    if conv is None or (call.parent is None and not _same_family(conv, branches)):
        return None
    while op.role in ("pass", "affine") and op is not conv and len(op.data) == 1:
        op = op.data[0]
    return op


def _same_family(conv: Op, branches: list[Op]) -> bool:
    """In a graph that holds many blocks, whether a conv's path says that it belongs with these."""
    paths = [op.path for op in branches if op.conv is not None]
    if any(p is None for p in [*paths, conv.path]):
        return True
    prefix = common_prefix([p for p in paths if p is not None])
    own = conv.path or ""
    return own == prefix or own.startswith(f"{prefix}.") or not prefix


def rep_sum(record: Record, call: Call, add: Op) -> FoundBlock | None:
    """A sum of linear branches: one convolution in disguise (RepVGG, Ding et al., arXiv:2101.03697)."""
    if add.role != "add" or len(add.data) != 2:
        return None
    following = next_after(add, ("pass",))
    if following is not None and following.role == "add":
        return None  # not the last of the sum
    leaves, stack = [], list(add.data)
    while stack:
        op = stack.pop()
        while op.role == "pass" and len(op.data) == 1:
            op = op.data[0]
        if op.role == "add" and op.call is call and len(op.data) == 2:
            stack.extend(op.data)
        else:
            leaves.append(op)
    source = common_source(record, call, leaves)
    if escapes(record, call, [source] if source is not None else call.inputs, {add}):
        return None
    region = (add.ancestors | add.bit) & call.mask
    if source is not None:
        region &= ~(source.ancestors | source.bit)
    ops = list(record.select(region))
    if not has_spatial_conv(ops) or has_nonlinearity(ops) or any(op.role in ("resize", "cat") for op in ops):
        return None
    if sum(leaf.bit & region != 0 for leaf in leaves) < 2 or (source is None and len(call.inputs) != 1):
        return None  # a lone conv beside its input encodes positions; values of two origins are no branches
    return FoundBlock("rep-sum", call, region, add, add)


def _covers_its_input(conv: Op) -> bool:
    """Whether a conv's kernel covers its whole input: a fully-connected layer, written as a convolution."""
    before = conv.data[0].shape
    assert conv.conv is not None
    dims = len(conv.conv.kernel)
    return (
        not conv.conv.transposed
        and all(s == 1 for s in conv.shape[-dims:])
        and tuple(before[-dims:]) == conv.conv.kernel
    )


def is_prediction(record: Record, projection: Op) -> bool:
    """Whether a projection is what a head predicts: no layer with weights comes behind it."""
    return not any(
        op.ancestors & projection.bit and op.role in ("conv", "linear", "norm")
        for op in record.ops[projection.index + 1 :]
    )


def chain_units(record: Record) -> Iterator[tuple[Op, Op]]:
    """Each conv with the non-linearity that closes its unit; a depthwise-separable pair is one unit."""
    outputs = {op for call in record.calls if call.parent is None for op in call.outputs}
    for conv in record.ops:
        if not conv.spatial_conv:
            continue
        if _covers_its_input(conv):
            continue
        following = next_after(conv, ("norm", "pass", "affine", "pool"))
        if conv.conv is not None and conv.conv.depthwise:
            pair = following
            if pair is not None and pair.role == "act":
                pair = next_after(pair, ("norm", "pass", "affine"))
            if pair is not None and is_pointwise(pair) and pair.conv is not None:
                closing = next_after(pair, ("norm", "pass", "affine", "pool"))
                if closing is not None and closing.role == "act":
                    following = closing
        if following is not None and following.role == "act" and (following not in outputs or real_users(following)):
            yield conv, following
