"""Which parts of a record are convolutional blocks, and of which kind.

Blocks are recognised by what their graphs do, never by a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .operations import is_conv_or_linear, only_user, real_users
from .record import Call, Op, Record
from .roles import is_sequential

# What leaves a value the same but for its place, its size or a linear map of each channel.
_TRANSPARENT = ("pass", "affine", "norm", "shape", "part", "pad")


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


def _has_nonlinearity(ops: Iterable[Op]) -> bool:
    """Self-attention counts as one."""
    return any(op.role in ("act", "other") or (op.role == "mul" and len(op.data) == 2) for op in ops)


def _has_spatial_conv(ops: Iterable[Op]) -> bool:
    return any(op.spatial_conv for op in ops)


def is_pointwise(op: Op) -> bool:
    return (op.conv is not None and not op.conv.spatial) or (op.role == "linear" and op.channel_dim == -1)


def _next_after(op: Op, through: tuple[str, ...]) -> Op | None:
    """The first operation behind ``op`` that does something else than ``through``, if there is just one way."""
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


def _joins_channels(op: Op) -> bool:
    """Whether a cat runs along the channels."""
    if op.role != "cat" or op.channels is None or len(op.data) < 2:
        return False
    dim = op.channel_dim
    shapes = [i.shape for i in op.data]
    assert dim is not None
    return all(len(s) == op.dim for s in shapes) and any(s[dim] != op.shape[dim] for s in shapes)


def _escapes(record: Record, call: Call, sources: Iterable[Op], cut: set[Op]) -> bool:
    """Whether some way from ``sources`` to what the module returns passes none of ``cut``."""
    reached = set(sources)
    for op in record.ops[call.start : call.end]:
        if op not in cut and any(i in reached for i in op.inputs):
            reached.add(op)
    return any(output in reached for output in call.outputs)


def _bypass_source(op: Op, call: Call, ancestors: int, projections: int = 2) -> Op | None:
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
        elif op.role not in (*_TRANSPARENT, "cat") and not (projections and op.role in ("pool", "resize")):
            return None
        if convs > projections or acts > 1:
            return None
        op = op.data[0]
    return op


# Blocks with a bypass ------------------------------------------------------------------


def residual_unit(record: Record, call: Call, add: Op) -> FoundBlock | None:
    if add.role != "add" or len(add.data) != 2 or len(add.inputs) != 2:
        return None
    if add.data[0].shape != add.data[1].shape:
        return None  # an embedding, say, that is the same all over the map
    for branch, skip in (add.data, add.data[::-1]):
        source = _bypass_source(skip, call, branch.ancestors)
        if source is None:
            continue
        region = (branch.ancestors | branch.bit) & call.mask
        common = bool(source.bit & branch.ancestors)
        if common:
            region &= ~(source.ancestors | source.bit)
        ops = list(record.select(region))
        if not _has_spatial_conv(ops) or not (_has_nonlinearity(ops) or _is_plain_convolution(record, call, add, ops)):
            continue
        if _escapes(record, call, [source] if common else call.inputs, {add}) and not _has_second_output(
            call, add, region
        ):
            continue
        if _is_query(source, region):
            continue
        if call.parent is None and any(map(_resizes, ops)) and not _resized_between(source, skip):
            continue  # it goes down in resolution and comes up again: a skip between the levels of an hourglass
        return FoundBlock("residual", call, region, add, branch, skip, source)
    return None


def _has_second_output(call: Call, add: Op, region: int) -> bool:
    """Whether all that goes past an add is what the module returns beside it, made in the branch (WaveNet's skip output)."""
    others = [output for output in call.outputs if output is not add]
    return (
        add in call.outputs
        and call.parent is not None
        and bool(others)
        and all(o.bit & region or (_all_from(o, region) and not o.ancestors & add.bit) for o in others)
    )


def _all_from(op: Op, region: int) -> bool:
    """Whether each operand of an operation is made in a region: none bypasses it (as in the concat of a dual path)."""
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
    return mixing and not any(map(_resizes, ops)) and rep_sum(record, call, add) is None


def _resizes(op: Op) -> bool:
    return op.role == "resize" or (op.conv is not None and op.conv.transposed)


def _resized_between(source: Op, op: Op) -> bool:
    while op is not source and op.data:
        if _resizes(op):
            return True
        op = op.data[0]
    return False


def split_unit(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """A cat of (part of) the input and new features that is what the module returns."""
    if not _joins_channels(cat):
        return None
    if not _is_returned(call, cat):
        return _split_in_graph(record, call, cat) if call.parent is None else None
    # in a dual path block (DPN), part of the new features is added to the bypass and part of them is put beside it
    added = {o: other for o in cat.data if (other := _added_to_bypass(o, call)) is not None}
    new, bypassed = [], False
    for operand in cat.data:
        if operand in added:
            new.append(added[operand])
        elif _bypass_source(operand, call, 0, projections=2 if added else 0) is not None:
            bypassed = True
        else:
            new.append(operand)
    if not bypassed or not new:
        return _split_inside(record, call, cat)
    if len(new) > 1:
        if any(a.bit & b.ancestors for a in new for b in new):
            return None  # they feed each other: see dense_layers
        common = _common_source(record, call, new)  # they are pieces of one value
        if common is None or common.channels is None:
            return None
        new = [common]
    return _new_features(record, cat, new[0], call, 0)


def _is_returned(call: Call, cat: Op) -> bool:
    """Whether all that a module returns is this value, at most activated or in another shape."""
    for output in call.outputs:
        while output is not cat:
            if output.role not in (*_TRANSPARENT, "act") or len(output.data) != 1 or not call.holds(output):
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
    if not whole.bit & new[0].ancestors or _escapes(record, call, [whole], {cat}):
        return None
    return _new_features(record, cat, new[0], call, whole.ancestors | whole.bit)


def _split_inside(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """The same where what is split is no input of the module, but a value that every way through the module passes."""
    whole = _common_source(record, call, cat.data)
    if whole is None or _escapes(record, call, call.inputs, {whole}):
        return None
    outside = whole.ancestors | whole.bit
    if whole in cat.data and any(map(is_conv_or_linear, record.select(outside & call.mask))):
        return None  # it is newly computed as well: a primary convolution and a cheap one (GhostNet)
    new = [o for o in cat.data if _bypass_source(o, call, outside, projections=0) is None]
    if len(new) != 1 or len(new) == len(cat.data):
        return None
    return _new_features(record, cat, new[0], call, outside)


def _new_features(record: Record, cat: Op, new: Op, call: Call, outside: int) -> FoundBlock | None:
    region = (new.ancestors | new.bit) & call.mask & ~outside
    ops = list(record.select(region))
    if not _has_spatial_conv(ops) or not _has_nonlinearity(ops):
        return None
    return FoundBlock("dense", call, region, cat, new)


def dense_layers(record: Record, call: Call, cat: Op) -> list[FoundBlock]:
    """A cat of one value and of what several layers made of it, each of which read all that came before it (Huang et
    al., arXiv:1608.06993). Where each reads the one before it alone, it is one block of several branches instead."""
    if not _joins_channels(cat) or len(cat.data) < 3:
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
        if (blocks and not reads_all) or not _has_spatial_conv(ops) or not _has_nonlinearity(ops):
            return []
        blocks.append(FoundBlock("dense", call, region, cat, operand, layered=True))
        seen |= operand.bit
        outside |= region
    return blocks


def _added_to_bypass(op: Op, call: Call) -> Op | None:
    """The new one of the two operands of an add, if the other is a bypass."""
    if op.role != "add" or len(op.data) != 2 or not call.holds(op):
        return None
    new = [o for o in op.data if _bypass_source(o, call, 0) is None]
    return new[0] if len(new) == 1 else None


def dual_path(record: Record, call: Call, joins: list[Op]) -> FoundBlock | None:
    """Several joins of one new value with what bypassed the block, which make up all that it returns (DPN)."""
    cut: set[Op] = set()
    new: list[Op] = []
    for join in joins:
        operands = join.data
        if join.role == "cat" and not _joins_channels(join):
            continue
        bypass = [o for o in operands if _bypass_source(o, call, 0, projections=1) is not None]
        rest = [o for o in operands if o not in bypass]
        if not bypass or len(rest) != 1:
            continue
        cut.add(join)
        new += rest
    if {join.role for join in cut} != {"add", "cat"} or _escapes(record, call, call.inputs, cut):
        return None
    common = call.mask
    for op in new:
        common &= op.ancestors | op.bit
    candidates = [op for op in record.select(common) if op.channels is not None]
    if not candidates:
        return None
    branch = candidates[-1]
    region = (branch.ancestors | branch.bit) & call.mask
    if not _has_spatial_conv(record.select(region)):
        return None
    return FoundBlock("dense", call, region, max(cut, key=lambda op: op.index), branch)


@dataclass(frozen=True, eq=False)
class InvertedCore:
    """``depthwise conv -> norm -> activation -> pointwise conv``, the core of the inverted bottleneck (Sandler et al.,
    arXiv:1801.04381; with SE in it: Tan et al., arXiv:1807.11626): the value that goes into the projection, the operation
    that takes it, and the projection's own value."""

    value: Op
    taker: Op
    projection: Op


def inverted_core(conv: Op) -> InvertedCore | None:
    """The core that begins with this depthwise conv."""
    if conv.conv is None or not conv.conv.depthwise or conv.pooled:
        return None
    op, acted = conv, False
    padded: tuple[Op, Op] | None = None  # what is padded before the projection, and the padding that takes it
    while True:
        users = real_users(op)
        gates = [u for u in users if is_gate(u)]
        if gates and all(u in gates or u.pooled for u in users):
            op = gates[0]
            continue
        pieces = [only_user(u) for u in users if u.role == "part"]
        if len(users) == len(pieces) > 1 and all(p is not None and is_pointwise(p) for p in pieces):
            joined = only_user(pieces[0]) if pieces[0] is not None else None  # a projection in groups (MixNet)
            return InvertedCore(op, users[0], joined) if acted and joined is not None and joined.role == "cat" else None
        if len(users) != 1:
            return None
        user = users[0]
        if is_pointwise(user):
            return InvertedCore(*(padded or (op, user)), user) if acted else None
        if user.role == "pad":  # padding for any kernel, which for one of size 1 is none
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


def projects(op: Op) -> bool:
    """Whether a pointwise conv is linear: no non-linearity follows it."""
    following = _next_after(op, ("norm", "pass", "affine", "shape"))
    return following is None or following.role != "act"


def core_of(record: Record, block: FoundBlock) -> InvertedCore | None:
    """The core of a residual unit that is an inverted bottleneck."""
    ops = list(record.select(block.region))
    spatial = [op for op in ops if op.spatial_conv]
    if not all(op.conv is not None and op.conv.depthwise for op in spatial):
        return None
    cores = {core.projection: core for core in map(inverted_core, spatial) if core is not None}
    if len(cores) != 1:
        return None
    projection, core = cores.popitem()
    if not projection.bit & block.region or not projects(projection):
        return None
    later = [
        op
        for op in ops
        if op.index > projection.index and (op.conv is not None or op.role == "linear") and not op.pooled
    ]
    return None if later else core


# Blocks without a bypass ------------------------------------------------------------------


def _common_source(record: Record, call: Call, ops: Iterable[Op]) -> Op | None:
    """The last operation of the module from which all of ``ops`` come."""
    common = call.mask
    for op in ops:
        common &= op.ancestors | op.bit
    common_ops = list(record.select(common))
    return common_ops[-1] if common_ops else None


def multi_branch(record: Record, call: Call, cat: Op) -> FoundBlock | None:
    """A channel cat of branches that come from one value; SE goes behind it, or behind the conv that fuses it."""
    if not _joins_channels(cat):
        return None
    source = _common_source(record, call, cat.data)
    if _escapes(record, call, [source] if source is not None else call.inputs, {cat}):
        return None
    block = _branches_from(record, call, cat, source)
    if (
        block is None
        and source is not None
        and call.parent is not None
        and not _escapes(record, call, call.inputs, {cat})
    ):
        # what the branches have in common belongs to the block itself, with what is made of it and the conv that fuses all
        block = _branches_from(record, call, cat, None)
        if block is not None and (block.branch is cat or not call.holds(block.branch)):
            return None
    return block


def _branches_from(record: Record, call: Call, cat: Op, source: Op | None) -> FoundBlock | None:
    outside = (source.ancestors | source.bit) if source is not None else 0
    ops = list(record.select(cat.ancestors & call.mask & ~outside))
    if not _has_spatial_conv(ops) or any(map(_resizes, ops)):
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
    prefix = _common_prefix([p for p in paths if p is not None])
    own = conv.path or ""
    return own == prefix or own.startswith(f"{prefix}.") or not prefix


def rep_sum(record: Record, call: Call, add: Op) -> FoundBlock | None:
    """A sum of linear branches: one convolution in disguise (RepVGG, Ding et al., arXiv:2101.03697)."""
    if add.role != "add" or len(add.data) != 2:
        return None
    following = _next_after(add, ("pass",))
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
    source = _common_source(record, call, leaves)
    if _escapes(record, call, [source] if source is not None else call.inputs, {add}):
        return None
    region = (add.ancestors | add.bit) & call.mask
    if source is not None:
        region &= ~(source.ancestors | source.bit)
    ops = list(record.select(region))
    if not _has_spatial_conv(ops) or _has_nonlinearity(ops) or any(op.role in ("resize", "cat") for op in ops):
        return None
    if sum(leaf.bit & region != 0 for leaf in leaves) < 2 or (source is None and len(call.inputs) != 1):
        return None  # a lone conv beside its input encodes positions; values of two origins are no branches
    return FoundBlock("rep-sum", call, region, add, add)


def _covers_its_input(conv: Op) -> bool:
    """Whether a conv leaves nothing of space: a fully-connected layer, written as a convolution."""
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
        following = _next_after(conv, ("norm", "pass", "affine", "pool"))
        if conv.conv is not None and conv.conv.depthwise:
            pair = following
            if pair is not None and pair.role == "act":
                pair = _next_after(pair, ("norm", "pass", "affine"))
            if pair is not None and is_pointwise(pair) and pair.conv is not None:
                closing = _next_after(pair, ("norm", "pass", "affine", "pool"))
                if closing is not None and closing.role == "act":
                    following = closing
        if following is not None and following.role == "act" and (following not in outputs or real_users(following)):
            yield conv, following


# Names ------------------------------------------------------------------


def _common_prefix(paths: list[str]) -> str:
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
    graph that holds more than the block, what the paths of its convolutions tell."""
    own = [op for op in record.select(block.region) if op.conv is not None and not op.pooled]
    paths = [op.path for op in own if op.path]
    outer = block.call
    if is_sequential(outer.module) or outer.path == "":
        held = [op for op in record.select(outer.mask) if op.spatial_conv]
        if any(not op.bit & block.region for op in held):
            prefix = _common_prefix(paths)
            return prefix if prefix != outer.path else (paths or [prefix])[0]
    while is_sequential(outer.module) and outer.parent is not None and outer.parent.path:
        if any(op.conv is not None and not outer.holds(op) for op in record.select(outer.parent.mask)):
            break
        outer = outer.parent
    return outer.path
