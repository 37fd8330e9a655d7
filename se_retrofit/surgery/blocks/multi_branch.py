"""Blocks with several branches that are joined."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import behind, is_conv_or_linear, only_user
from ..record.graph import Call, Op, Record
from .attended import spatial_convs
from .block import Block, Target
from .questions import (
    common_source,
    escapes,
    feeds_a_layer,
    has_nonlinearity,
    joins_channels,
    own_operations,
    prefix_of,
    resizes,
)


def multi_branch_blocks(record: Record) -> Iterator[Block]:
    """A concat along the channels of branches from one value: SE goes after it, or after the 1x1 conv that fuses it
    (Inception, Szegedy et al., arXiv:1409.4842; with SE: Hu et al., section 3.3; Fire, OSA, CSP and NAS cells)."""
    for call in record.calls:
        for cat in reversed(own_operations(record, call)):
            scope, block = call, _block(record, call, cat)
            while block is None and scope.parent is not None and scope.outputs == [cat]:
                scope = scope.parent  # the conv that fuses the branches may be further out than the concat
                block = _block(record, scope, cat)
            if block is not None:
                yield block


def _block(record: Record, call: Call, cat: Op) -> Block | None:
    if not joins_channels(cat):
        return None
    source = common_source(record, call, cat.data)
    if escapes(record, call, [source] if source is not None else call.inputs, {cat}):
        return None
    block = _branches_from(record, call, cat, source)
    if block is not None or source is None or call.parent is None or escapes(record, call, call.inputs, {cat}):
        return block
    # what the branches share belongs to the block itself, with what is computed from it and the conv that fuses all;
    # without such a conv, two values may be a convolution and a cheap one (GhostNet)
    block = _branches_from(record, call, cat, None)
    if block is not None and (len(cat.data) < 3 if block.branch is cat else not call.holds(block.branch)):
        return None
    return block


def _branches_from(record: Record, call: Call, cat: Op, source: Op | None) -> Block | None:
    outside = source.lineage if source is not None else 0
    ops = list(record.select(cat.ancestors & call.mask & ~outside))
    if not spatial_convs(ops) or any(map(resizes, ops)):
        return None
    convolved = [o for o in cat.data if any(p.conv is not None for p in record.select(call.region(o, outside)))]
    pooled = [o for o in cat.data if o.role == "pool" and call.holds(o) and not o.bit & outside]
    bypasses = [o for o in cat.data if o not in convolved and o not in pooled]
    end = _fusing_end(call, cat, ops)
    filters = all(op.conv is None or op.depthwise for op in ops) and not has_nonlinearity(ops)
    if end is None and filters and not any(op.role == "norm" for op in ops):
        return None  # each piece of a value is filtered: one depthwise convolution, with kernels of several sizes
    if len(convolved) < 2 or (bypasses and end is None) or _predicts(record, cat):
        return None
    end = end or cat
    return Block("multi-branch", call, call.region(end, outside), end, cat, target=Target(call, end))


def _predicts(record: Record, cat: Op) -> bool:
    """Return whether a concat joins the predictions of heads (boxes, scores, keypoints): no learned layer follows it,
    and at least one branch ends in a learned layer, possibly squashed."""
    return not feeds_a_layer(record, cat) and any(map(_is_decoded, cat.data))


def _is_decoded(op: Op) -> bool:
    """Return whether a value is a layer's prediction: squashed, scaled and shifted, possibly piece by piece."""
    while op.role in ("pass", "affine", "shape", "part") or (op.role == "act" and op.name.lower() in _SQUASHING):
        if len(op.data) != 1:
            break
        (op,) = op.data
    if op.role == "cat" or op.name == "write":
        return bool(op.data) and all(map(_is_decoded, op.data))
    return is_conv_or_linear(op)


_SQUASHING = ("sigmoid", "tanh", "exp", "softmax", "_softmax", "log_softmax", "_log_softmax", "softplus", "softmax2d")


def _fusing_end(call: Call, cat: Op, branches: list[Op]) -> Op | None:
    """Return the last value of the pointwise conv that fuses a concat, including its norm and activation."""
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
    return behind(op, ("pass", "affine"))


def _same_family(conv: Op, branches: list[Op]) -> bool:
    """Return whether, in a graph with many blocks, a convolution's path shows that it belongs with these branches."""
    paths = [op.path for op in branches if op.conv is not None]
    if any(p is None for p in [*paths, conv.path]):
        return True
    prefix = prefix_of([p for p in paths if p is not None])
    own = conv.path or ""
    return own == prefix or own.startswith(f"{prefix}.") or not prefix
