"""The core of the inverted bottleneck, with or without a bypass around it."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import innermost, is_conv_or_linear, only_user, real_users
from ..record.graph import Op, Record
from .block import Block, Target
from .questions import edge, feeds_a_layer, is_gate, is_pointwise, next_after


def inverted_bottlenecks(record: Record) -> Iterator[Block]:
    """The core of an inverted bottleneck without a bypass: SE goes after the depthwise convolution's norm and
    activation (MobileNetV2, Sandler et al., arXiv:1801.04381; with SE: MnasNet, Tan et al., arXiv:1807.11626)."""
    for conv in record.ops:
        core = _core(conv)
        if core is None or not _projects(core[-1]) or not feeds_a_layer(record, core[-1]):
            continue
        value, taker, end = core
        region = end.lineage & ~conv.ancestors
        yield Block("inverted", innermost(conv, end), region, end, end, target=edge(value, taker))


def _core(conv: Op) -> tuple[Op, Op, Op] | None:
    """Return the core that starts with a depthwise convolution, ``conv -> norm -> activation -> projection``: the input
    of the projection, the operation that takes it, and the output of the projection."""
    if not conv.depthwise or conv.flat:
        return None
    op, acted = conv, conv.activated
    padded: tuple[Op, Op] | None = None  # the value that is padded before the projection, and the padding
    while True:
        users = real_users(op)
        gates = [u for u in users if is_gate(u)]
        if gates and all(u in gates or u.pooled for u in users):
            op = gates[0]
            continue
        pieces = [only_user(u) for u in users if u.role == "part"]
        if len(users) == len(pieces) > 1 and all(p is not None and is_pointwise(p) for p in pieces):
            joined = only_user(pieces[0]) if pieces[0] is not None else None  # a grouped projection (MixNet)
            return (op, users[0], joined) if acted and joined is not None and joined.role == "cat" else None
        if len(users) > 1 and acted and all(map(_is_summed, users)):
            return op, users[0], users[0]
        if len(users) != 1:
            return None
        user = users[0]
        if is_pointwise(user):
            return (*(padded or (op, user)), user) if acted else None
        if user.role == "pad":  # padding for any kernel, which is zero for one of size 1
            padded, op = padded or (op, user), user
            continue
        padded = None
        if user.role == "cat":  # kernels of several sizes side by side (MixConv)
            if not all(i.depthwise for i in user.data):
                return None
        elif user.role == "act":
            acted = True
        elif user.role not in ("norm", "pass", "affine", "pool", "shape") or len(user.data) != 1:
            return None
        op = user


def _is_summed(op: Op) -> bool:
    """Return whether a pointwise convolution computes a term of a sum: the residual or the skip output of a unit
    (Conv-TasNet, Luo and Mesgarani, arXiv:1809.07454)."""
    join = next_after(op, ("norm", "pass", "affine"))
    return is_pointwise(op) and join is not None and join.role == "add"


def _projects(op: Op) -> bool:
    """Return whether a pointwise convolution is linear and ends a block: it is followed neither by a non-linearity nor
    directly by a depthwise convolution (of which it would be the first half: Haase and Amthor, arXiv:2003.13549)."""
    following = next_after(op, ("norm", "pass", "affine", "shape"))
    other_half = next_after(op, ("pass", "pad"))
    if other_half is not None and other_half.depthwise:
        return False
    return following is None or following.role != "act"


def inverted_target(record: Record, block: Block) -> Target | None:
    """Return where SE goes in a residual unit that is an inverted bottleneck; None for any other unit."""
    ops = list(record.select(block.region))
    spatial = [op for op in ops if op.spatial_conv]
    if not all(op.depthwise for op in spatial):
        return None
    cores = {core[-1]: core for core in map(_core, spatial) if core is not None}
    if len(cores) != 1:
        return None
    ((value, taker, projection),) = cores.values()
    if not projection.bit & block.region or not _projects(projection):
        return None
    later = [op for op in ops if op.index > projection.index and not op.flat]
    return None if any(map(is_conv_or_linear, later)) else edge(value, taker)
