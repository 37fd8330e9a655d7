"""What a convolutional block is, and the questions by which the recognisers beside this file find them.

Blocks are recognised by what their graphs do, never by a name: those that something bypasses in ``bypass``, the inverted
bottleneck's core in ``inverted``, all others in ``branches``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .operations import only_user, real_users
from .record import Call, Op, Record
from .roles import is_sequential

# What leaves a value the same but for its place, its size or a linear map of each channel.
TRANSPARENT = ("pass", "affine", "norm", "shape", "part", "pad")


@dataclass(eq=False)
class FoundBlock:
    """A block found: the operations it computes anew (a bit set), and its scope."""

    kind: str
    call: Call
    region: int
    join: Op
    branch: Op
    skip: Op | None = None
    source: Op | None = None
    layered: bool = False  # one of several dense layers that feed each other


# Questions about operations ------------------------------------------------------------------


def is_gate(op: Op) -> bool:
    """``x * f(pool(x))`` with a learned or non-linear f: channel attention."""
    if op.role != "mul" or op.name == "div" or len(op.data) != 2:
        return False
    a, b = op.data
    if a.pooled == b.pooled:
        return False
    gate, scaled = (a, b) if a.pooled else (b, a)
    # one value for all channels weighs a whole branch, as a mixture of experts does
    return gate.excited and scaled.channels != 1 and math.prod(gate.shape[1:]) > 1


def has_nonlinearity(ops: Iterable[Op]) -> bool:
    """Self-attention counts as one."""
    return any(op.role in ("act", "other") or (op.role == "mul" and len(op.data) == 2) for op in ops)


def has_spatial_conv(ops: Iterable[Op]) -> bool:
    return any(op.spatial_conv for op in ops)


def is_pointwise(op: Op) -> bool:
    return (op.conv is not None and not op.conv.spatial) or (op.role == "linear" and op.channel_dim == -1)


def next_after(op: Op, through: tuple[str, ...]) -> Op | None:
    """The first operation after ``op`` whose role is not in ``through``, if only one path leads there."""
    user = only_user(op)
    while user is not None and user.role in through and len(user.data) == 1:
        user = only_user(user)
    return user


def gated_after(op: Op) -> bool:
    """Whether a channel gate follows a value at once, or behind its norm and activation."""
    while True:
        users = real_users(op)
        if any(is_gate(u) for u in users) and all(is_gate(u) or u.pooled for u in users):
            return True
        if len(users) != 1 or users[0].role not in ("norm", "pass", "affine", "act") or len(users[0].data) != 1:
            return False
        op = users[0]


def joins_channels(op: Op) -> bool:
    """Whether a cat runs along the channels."""
    if op.role != "cat" or op.channels is None or len(op.data) < 2:
        return False
    dim = op.channel_dim
    shapes = [i.shape for i in op.data]
    assert dim is not None
    return all(len(s) == op.dim for s in shapes) and any(s[dim] != op.shape[dim] for s in shapes)


def escapes(record: Record, call: Call, sources: Iterable[Op], cut: set[Op]) -> bool:
    """Whether some path from ``sources`` to what the module returns passes none of ``cut``."""
    reached = set(sources)
    for op in record.ops[call.start : call.end]:
        if op not in cut and any(i in reached for i in op.takes):
            reached.add(op)
    return any(output in reached for output in call.outputs)


def bypass_source(op: Op, call: Call, ancestors: int, projections: int = 2) -> Op | None:
    """Where a bypass begins: follow ``op`` back, through a linear projection at most (pools, and one or two convolutions:
    a depthwise-separable pair), to something in ``ancestors`` or to an input of the module. None if it is no bypass."""
    given = set(call.inputs)
    convs = acts = 0
    while not (op.bit & ancestors or op in given):
        if op.role == "cat" and all(i in given for i in op.data):
            return op  # all inputs of the module, side by side
        if not call.holds(op) or len(op.data) != 1:
            return None
        if op.conv is not None or is_pointwise(op):
            convs += 1
        elif op.role == "act" and convs:
            acts += 1  # the projection of a pre-activated input
        elif op.role not in (*TRANSPARENT, "cat") and not (projections and op.role in ("pool", "resize")):
            return None
        if convs > projections or acts > 1:
            return None
        op = op.data[0]
    return op


def resizes(op: Op) -> bool:
    return op.role == "resize" or (op.conv is not None and op.conv.transposed)


def common_source(record: Record, call: Call, ops: Iterable[Op]) -> Op | None:
    """The last operation of the module from which all of ``ops`` come."""
    common = call.mask
    for op in ops:
        common &= op.ancestors | op.bit
    common_ops = list(record.select(common))
    return common_ops[-1] if common_ops else None


# Names ------------------------------------------------------------------


def common_prefix(paths: list[str]) -> str:
    parts = [p.split(".") for p in paths]
    prefix = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        prefix.append(level[0])
    if prefix and any(len(p) == len(prefix) for p in parts):
        prefix.pop()
    return ".".join(prefix)


def name_of(record: Record, block: FoundBlock) -> str:
    """The path of a block: that of the module in which it stands, or of one around it that holds nothing else; in a
    graph that holds more than the block, what the paths of its convolutions tell. Those convolutions of a plain chain that
    are a unit of the network together (the two of a U-Net's double convolution) are named after the unit."""
    outer = block.call
    if is_sequential(outer.module) or outer.path == "":
        held = [op for op in record.select(outer.mask) if op.spatial_conv]
        if any(not op.bit & block.region for op in held):
            if block.kind == "chain" and is_unit(record, outer):
                return outer.path
            paths = conv_paths(record, block)
            prefix = common_prefix(paths)
            return prefix if prefix != outer.path else (paths or [prefix])[0]
    return _around(record, outer).path


def other_names(record: Record, block: FoundBlock) -> tuple[str, ...]:
    """What a part of a plain chain may be asked for by beside its name: its convolutions, and a module that holds its unit alone."""
    if block.kind != "chain":
        return ()
    name, around = name_of(record, block), _around(record, block.call).path
    names = [*conv_paths(record, block), *([around] if name.startswith(f"{around}.") else [])]
    return tuple(path for path in dict.fromkeys(names) if path != name)


def conv_paths(record: Record, block: FoundBlock) -> list[str]:
    own = (op for op in record.select(block.region) if op.conv is not None and not op.pooled)
    return [op.path for op in own if op.path]


def _around(record: Record, call: Call) -> Call:
    """A sequence, or the outermost module around it that holds no convolution beside."""
    while is_sequential(call.module) and call.parent is not None and call.parent.path:
        if any(op.conv is not None and not call.holds(op) for op in record.select(call.parent.mask)):
            break
        call = call.parent
    return call


def is_unit(record: Record, call: Call) -> bool:
    """Whether a sequence with several convolutions is a unit of which the network has more: it and another one compute at one
    size each. The features of a VGG are none, since their size changes, nor is the one body of a network."""
    return _is_of_one_size(record, call) and any(
        _is_of_one_size(record, other)
        for other in record.calls
        if not other.mask & call.mask and other.path != call.path
    )


def _is_of_one_size(record: Record, call: Call) -> bool:
    if not is_sequential(call.module) or not call.path:
        return False
    ops = list(record.select(call.mask))
    convs = [op for op in ops if op.spatial_conv]
    sizes = {tuple(op.shape[-len(op.conv.kernel) :]) for op in convs if op.conv is not None}
    return len(convs) > 1 and len(sizes) == 1
