"""The core of the inverted bottleneck, with or without a bypass around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..record.facts import innermost, only_user, real_users
from ..record.graph import Op, Record
from .block import Block
from .questions import edge, is_gate, is_pointwise, next_after


def inverted_bottlenecks(record: Record) -> Iterator[Block]:
    """The core of an inverted bottleneck without a bypass: SE goes after the depthwise convolution's norm and
    activation (MobileNetV2, Sandler et al., arXiv:1801.04381; with SE: MnasNet, Tan et al., arXiv:1807.11626)."""
    for conv in record.ops:
        core = _inverted_core(conv)
        if core is None or not _projects(core.projection) or _is_prediction(record, core.projection):
            continue
        call = innermost(record, [conv, core.projection])
        if call is None:
            continue
        region = core.projection.lineage & ~conv.ancestors
        target = edge(record, core.value, core.taker)
        yield Block("inverted", call, region, core.projection, core.projection, target=target)


@dataclass(frozen=True, eq=False)
class _InvertedCore:
    """``depthwise conv -> norm -> activation -> pointwise conv``: the input of the projection, the operation that takes
    it, and the output of the projection."""

    value: Op
    taker: Op
    projection: Op


def _inverted_core(conv: Op) -> _InvertedCore | None:
    """Return the core that starts with this depthwise convolution."""
    if conv.conv is None or not conv.conv.depthwise or conv.flat:
        return None
    op, acted = conv, False
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
            return (
                _InvertedCore(op, users[0], joined) if acted and joined is not None and joined.role == "cat" else None
            )
        if len(users) > 1 and acted and all(map(_is_summed, users)):
            return _InvertedCore(op, users[0], users[0])
        if len(users) != 1:
            return None
        user = users[0]
        if is_pointwise(user):
            return _InvertedCore(*(padded or (op, user)), user) if acted else None
        if user.role == "pad":  # padding for any kernel, which is zero for one of size 1
            padded, op = padded or (op, user), user
            continue
        padded = None
        if user.role == "cat":  # kernels of several sizes side by side (MixConv)
            if not all(i.conv is not None and i.conv.depthwise for i in user.data):
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
    if other_half is not None and other_half.conv is not None and other_half.conv.depthwise:
        return False
    return following is None or following.role != "act"


def core_of(record: Record, block: Block) -> _InvertedCore | None:
    """Return the core of a residual unit that is an inverted bottleneck."""
    ops = list(record.select(block.region))
    spatial = [op for op in ops if op.spatial_conv]
    if not all(op.conv is not None and op.conv.depthwise for op in spatial):
        return None
    cores = {core.projection: core for core in map(_inverted_core, spatial) if core is not None}
    if len(cores) != 1:
        return None
    projection, core = cores.popitem()
    if not projection.bit & block.region or not _projects(projection):
        return None
    later = [
        op for op in ops if op.index > projection.index and (op.conv is not None or op.role == "linear") and not op.flat
    ]
    return None if later else core


def _is_prediction(record: Record, projection: Op) -> bool:
    """Return whether a projection is the prediction of a head: no layer with weights follows it."""
    return not any(
        op.ancestors & projection.bit and op.role in ("conv", "linear", "norm")
        for op in record.ops[projection.index + 1 :]
    )
