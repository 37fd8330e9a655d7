"""Questions of the recognisers about operations, calls and the paths between them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from itertools import takewhile

from ..record.facts import LEARNED, innermost, only_user, real_users
from ..record.graph import Call, Op, Record
from .block import Target

# What leaves a value the same except for its position, its size or a linear map of each channel.
TRANSPARENT = ("pass", "affine", "norm", "shape", "part", "pad")


def own_operations(record: Record, call: Call) -> list[Op]:
    """Return the operations of a module's own code in a call, including its helpers': ``self.add(x, self.body(x))``."""
    own = [call]
    for outer in own:
        own += [child for child in outer.children if _is_helper(record, child)]
    own_calls = set(own)
    return [op for op in record.ops[call.start : call.end] if op.call in own_calls]


def _is_helper(record: Record, call: Call) -> bool:
    """Return whether a call is that of a small module without a learned layer."""
    ops = record.ops[call.start : min(call.end, call.start + _HELPER + 1)]
    return len(ops) <= _HELPER and not any(op.role in LEARNED for op in ops)


_HELPER = 12  # operations


def is_gate(op: Op) -> bool:
    """Return whether an operation is ``x * f(pool(x))`` with a learned or non-linear f: channel attention. Its gate has
    one value per channel and no extent in space or time, or an extent and all channels (coordinate attention, Hou et
    al., arXiv:2103.02907); otherwise it is a mask."""
    if op.role != "mul" or op.name == "div" or len(op.data) != 2:
        return False
    a, b = op.data
    if (a.pooled, a.flat) == (b.pooled, b.flat):
        return False
    gate, scaled = (a, b) if (a.pooled, a.flat) > (b.pooled, b.flat) else (b, a)
    if not gate.flat and gate.channels != scaled.channels:
        return False
    # a single value for all channels weights a whole branch, as in a mixture of experts
    return gate.excited and scaled.channels != 1 and math.prod(gate.shape[1:]) > 1


def has_nonlinearity(ops: Iterable[Op]) -> bool:
    """Return whether one of the operations is a non-linearity; self-attention counts as one."""
    return any(op.role in ("act", "other") or op.activated or (op.role == "mul" and len(op.data) == 2) for op in ops)


def has_spatial_conv(ops: Iterable[Op]) -> bool:
    return any(op.spatial_conv for op in ops)


def is_pointwise(op: Op) -> bool:
    return (op.conv is not None and not op.conv.spatial) or (op.role == "linear" and op.channel_dim == -1)


def next_after(op: Op, through: tuple[str, ...]) -> Op | None:
    """Return the first operation after ``op`` whose role is not in ``through``, if only one path leads there."""
    user = only_user(op)
    while user is not None and user.role in through and len(user.data) == 1:
        user = only_user(user)
    return user


def activation_after(conv: Op) -> Op | None:
    """Return the non-linearity after a convolution, its norm and a pool: that of the value, possibly permuted; of its
    halves together (a gated linear unit, a maximum); or beside pools and concats that tap the value (preactivation)."""
    op = conv
    while not op.activated:
        users = real_users(op)
        acts = [u for u in users if u.role == "act"]
        if len(acts) == 1 and all(u in acts or u.role in ("pool", "cat") for u in users):
            return acts[0]
        if len(users) > 1 and all(u.role == "part" for u in users):
            return _join_of_halves(users)
        if len(users) != 1 or len(users[0].data) != 1:
            return None
        (user,) = users
        moved = user.role == "shape" and user.channels == op.channels
        if not moved and user.role not in ("norm", "pass", "affine", "pool"):
            return None
        op = user
    return op


def _join_of_halves(halves: list[Op]) -> Op | None:
    """Return the only product or maximum of two halves of a value, each of which may be activated."""
    joins = [next_after(half, ("norm", "pass", "affine", "act")) or half for half in halves]
    if len(halves) == 2 and joins[0] is joins[1] and joins[0].role in ("mul", "act") and len(joins[0].data) == 2:
        return joins[0]
    return None


def gate_after(op: Op) -> Op | None:
    """Return the channel gate that follows a value directly, or after its norm and activation; None if there is none."""
    while True:
        users = real_users(op)
        gates = [u for u in users if is_gate(u)]
        if gates and all(u in gates or u.pooled for u in users):
            return gates[0]
        if len(users) != 1 or users[0].role not in ("norm", "pass", "affine", "act") or len(users[0].data) != 1:
            return None
        op = users[0]


def joins_channels(op: Op) -> bool:
    """Return whether a concat is along the channels."""
    dim = op.channel_dim
    if op.role != "cat" or dim is None or op.channels is None or len(op.data) < 2:
        return False
    shapes = [i.shape for i in op.data]
    return all(len(s) == op.dim for s in shapes) and any(s[dim] != op.shape[dim] for s in shapes)


def feeds_a_layer(record: Record, value: Op) -> bool:
    """Return whether a learned layer depends on a value, which then is not a prediction."""
    return any(value.bit & op.ancestors and op.role in LEARNED for op in record.ops[value.index + 1 :])


def escapes(record: Record, call: Call, sources: Iterable[Op], cut: set[Op]) -> bool:
    """Return whether a path from ``sources`` to the module's output passes none of ``cut``. A source that the module
    returns as it is, beside what it computes (SelecSLS, Mehta et al., arXiv:1907.00837), is no such path."""
    sources = set(sources)
    return not (_reached(record, call, sources, cut) - sources).isdisjoint(call.outputs)


def derives(record: Record, call: Call, value: Op, source: Op, but: Op | None = None) -> bool:
    """Return whether a module computes one value from another, by a path that does not pass a third."""
    return value in _reached(record, call, [source], {but})


def _reached(record: Record, call: Call, sources: Iterable[Op], cut: Collection[Op | None]) -> set[Op]:
    reached = set(sources)
    for op in record.ops[call.start : call.end]:
        if op not in cut and any(i in reached for i in op.takes):
            reached.add(op)
    return reached


def bypass_source(op: Op, call: Call, ancestors: int, projections: int = 2) -> Op | None:
    """Return the start of a bypass: follow ``op`` back, at most through a projection, to something in ``ancestors`` or
    to an input; None if it is not a bypass. A projection may have pools, and one convolution or a depthwise-separable
    pair. It may have one activation: before the convolution, or after a pointwise one, except in the network itself."""
    given = set(call.inputs)
    convs: list[Op] = []
    acts = 0
    acted = False  # behind all convolutions
    while not (op.bit & ancestors or op in given):
        if op.role == "cat" and all(i in given for i in op.data):
            return op  # all inputs of the module, side by side
        if op.role == "cat" and len(op.data) > 1 and projections and not acts:
            # a projection in halves, of pixels that are one apart (Gastaldi, arXiv:1705.07485)
            sources = {bypass_source(half, call, ancestors, projections - len(convs)) for half in op.data}
            return sources.pop() if len(sources) == 1 else None
        if not call.holds(op) or len(op.data) != 1:
            return None
        if op.conv is not None or is_pointwise(op):
            convs.append(op)
        elif op.role == "act":
            acts += 1
            acted = acted or not convs
        elif op.role not in (*TRANSPARENT, "cat") and not (projections and op.role in ("pool", "resize")):
            return None
        separable = len(convs) < 2 or any(conv.depthwise for conv in convs)
        if len(convs) > projections or acts > 1 or not separable:
            return None
        op = op.data[0]
    projects = len(convs) == 1 and is_pointwise(convs[0]) and call.parent is not None
    return None if acted and not projects else op


def summands(call: Call, add: Op) -> list[tuple[Op, Op]]:
    """Return the values that are added one after another, as in ``x + a + b``, each with the add that takes it; an empty
    list if ``add`` is not an add of two values."""
    found = []
    for value in add.data if add.role == "add" and len(add.data) == 2 else ():
        inner = summands(call, value) if only_user(value) is add and call.holds(value) else []
        found += inner or [(value, add)]
    return found


def resizes(op: Op) -> bool:
    return op.role == "resize" or (op.conv is not None and op.conv.transposed)


def common_source(record: Record, call: Call, ops: Iterable[Op]) -> Op | None:
    """Return the last operation of the module on which all of ``ops`` depend."""
    common = call.mask
    for op in ops:
        common &= op.lineage
    common_ops = list(record.select(common))
    return common_ops[-1] if common_ops else None


def prefix_of(paths: list[str]) -> str:
    """Return the common prefix of paths, without the last part of any of them."""
    levels = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


# Where values appear -------------------------------------------------------------------------


def before(op: Op, call: Call, roles: tuple[str, ...]) -> Op:
    """Follow a value back through these roles to the module's own code, but not through a norm (FrozenBatchNorm2d)."""
    shown, hidden = op, []
    while op.role in roles and len(op.data) == 1 and only_user(op.data[0]) is op:
        hidden.append(op)
        op = op.data[0]
        if call.shows(op):
            if len(hidden) > 1 and any(map(_shifts, hidden)):
                break
            shown, hidden = op, []
    return shown


def _shifts(op: Op) -> bool:
    return op.role == "affine" and op.name not in ("mul", "multiply", "div")


def edge(value: Op, taker: Op) -> Target:
    """Return a value as it appears in the module in whose own graph it passes from one operation to another."""
    call = innermost(value, taker)
    return Target(call, before(value, call, ("pass",)))
