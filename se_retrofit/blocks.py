"""Which parts of a network are convolutional blocks, of which kind, and where in them SE goes.

One principle: SE recalibrates what the block has newly computed, once, at the last value before it joins what bypassed
the block (Hu et al., section 3.3 and 6.4). Blocks are recognised by what their graphs do, never by a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .reading import Network, Op, Reading
from .rehearsal import Call

__all__ = ["PLACEMENTS", "Spot", "Survey", "survey"]

PLACEMENTS = ("auto", "standard", "pre", "post", "identity", "3x3")

HAS_ATTENTION = "has channel attention already"

# What leaves a value the same but for its place, its size or a linear map of each channel.
_TRANSPARENT = ("pass", "affine", "norm", "shape", "part", "pad")


@dataclass(eq=False)
class Spot:
    """A place for SE: behind ``node`` of the graph of ``reading``'s module.

    ``users`` are the nodes that get the recalibrated value; None means all.
    """

    block: str
    kind: str
    reading: Reading
    node: fx.Node
    op: Op
    users: frozenset[fx.Node] | None = None

    @property
    def channels(self) -> int:
        assert self.op.channels is not None
        return self.op.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.op.value.dtype

    @property
    def overwritten(self) -> bool:
        """Whether the network itself overwrites the value next (``out += identity``): then SE may do so, too."""
        users = list(self.node.users)
        if self.users is not None or len(users) != 1 or users[0].args[:1] != (self.node,):
            return False
        user = users[0]
        if user.op == "call_module":
            return getattr(self.reading.call.module.get_submodule(str(user.target)), "inplace", False) is True
        if user.op == "call_method":
            return str(user.target).endswith("_") and not str(user.target).endswith("__")
        name = getattr(user.target, "__name__", "")
        return name in ("iadd", "isub", "imul", "itruediv") or user.kwargs.get("inplace") is True or name.endswith("_")


@dataclass(eq=False)
class Survey:
    """What was found in a network: where SE goes, and which blocks are left out and why."""

    spots: list[Spot] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    attended: int = 0  # blocks that have channel attention already


@dataclass(eq=False)
class _Block:
    """A block found: the operations it computes anew (a bit set), and its scope."""

    kind: str
    reading: Reading
    region: int
    join: Op
    branch: Op
    skip: Op | None = None
    source: Op | None = None
    layered: bool = False  # one of several dense layers that feed each other


# Questions about operations ---------------------------------------------------------------------------------------------


def is_gate(op: Op) -> bool:
    """``x * f(pool(x))`` with a learned or non-linear f: channel attention."""
    if op.role != "mul" or len(op.data) != 2:
        return False
    a, b = op.data
    if a.pooled == b.pooled:
        return False
    gate, scaled = (a, b) if a.pooled else (b, a)
    return gate.excited and scaled.channels != 1


def _has_nonlinearity(ops: Iterable[Op]) -> bool:
    """Self-attention counts as one."""
    return any(op.role in ("act", "other") or (op.role == "mul" and len(op.data) == 2) for op in ops)


def _has_spatial_conv(ops: Iterable[Op]) -> bool:
    return any(op.spatial_conv for op in ops)


def _only_user(op: Op) -> Op | None:
    users = [u for u in op.users if u.role != "param"]
    return users[0] if len(users) == 1 else None


def _pointwise(op: Op) -> bool:
    return (op.conv is not None and not op.conv.spatial) or (op.role == "linear" and op.channel_dim == -1)


def _next_after(op: Op, through: tuple[str, ...]) -> Op | None:
    """The first operation behind ``op`` that does something else than ``through``, if there is just one way."""
    user = _only_user(op)
    while user is not None and user.role in through and len(user.data) == 1:
        user = _only_user(user)
    return user


def _gated_after(op: Op) -> bool:
    """Whether a channel gate follows a value at once, or behind its norm and activation."""
    while True:
        users = [u for u in op.users if u.role != "param"]
        if any(is_gate(u) for u in users) and all(is_gate(u) or u.pooled for u in users):
            return True
        if len(users) != 1 or users[0].role not in ("norm", "pass", "affine", "act") or len(users[0].data) != 1:
            return False
        op = users[0]


def _joins_channels(op: Op) -> bool:
    """Whether a cat runs along the channels."""
    if op.role != "cat" or not isinstance(op.value, Tensor) or op.channels is None or len(op.data) < 2:
        return False
    dim = op.channel_dim
    shapes = [i.value.shape for i in op.data if isinstance(i.value, Tensor)]
    assert dim is not None
    return all(len(s) == op.value.dim() for s in shapes) and any(s[dim] != op.value.shape[dim] for s in shapes)


def _escapes(network: Network, reading: Reading, sources: Iterable[Op], cut: set[Op]) -> bool:
    """Whether some way from ``sources`` to what the module returns passes none of ``cut``."""
    reached = set(sources)
    for op in network.ops[reading.start : reading.end]:
        if op not in cut and any(i in reached for i in op.inputs):
            reached.add(op)
    return any(output in reached for output in reading.outputs)


def _bypass_source(op: Op, reading: Reading, ancestors: int, projections: int = 2) -> Op | None:
    """Where a bypass begins: follow ``op`` back, through a linear projection at most (pools, and one or two convolutions:
    a depthwise-separable pair), to something in ``ancestors`` or to an input of the module. None if it is no bypass."""
    given = set(reading.inputs)
    convs = acts = 0
    while not (op.bit & ancestors or op in given):
        if not reading.holds(op) or len(op.data) != 1:
            return None
        if op.conv is not None or _pointwise(op):
            convs += 1
        elif op.role == "act" and convs:
            acts += 1  # the projection of a pre-activated input
        elif op.role not in (*_TRANSPARENT, "cat") and not (projections and op.role in ("pool", "resize")):
            return None
        if convs > projections or acts > 1:
            return None
        op = op.data[0]
    return op


# Blocks with a bypass -----------------------------------------------------------------------------------------------------


def _residual(network: Network, reading: Reading, add: Op) -> _Block | None:
    if add.role != "add" or len(add.data) != 2 or len(add.inputs) != 2:
        return None
    for branch, skip in (add.data, add.data[::-1]):
        source = _bypass_source(skip, reading, branch.ancestors)
        if source is None:
            continue
        region = (branch.ancestors | branch.bit) & reading.mask
        common = bool(source.bit & branch.ancestors)
        if common:
            region &= ~(source.ancestors | source.bit)
        ops = list(network.select(region))
        if not _has_spatial_conv(ops) or not _has_nonlinearity(ops):
            continue
        if _escapes(network, reading, [source] if common else reading.inputs, {add}):
            continue
        return _Block("residual", reading, region, add, branch, skip, source)
    return None


def _dense(network: Network, reading: Reading, cat: Op) -> _Block | None:
    """A cat of (part of) the input and new features that is what the module returns."""
    if not _joins_channels(cat):
        return None
    for output in reading.outputs:
        while output is not cat:
            if output.role not in (*_TRANSPARENT, "act") or len(output.data) != 1 or not reading.holds(output):
                return None
            output = output.data[0]
    if not reading.outputs:
        return None
    # in a dual path block (DPN), part of the new features is added to the bypass and part of them is put beside it
    added = {o: other for o in cat.data if (other := _added_to_bypass(o, reading)) is not None}
    new, bypassed = [], False
    for operand in cat.data:
        if operand in added:
            new.append(added[operand])
        elif _bypass_source(operand, reading, 0, projections=2 if added else 0) is not None:
            bypassed = True
        else:
            new.append(operand)
    if not bypassed or not new:
        return None
    if len(new) > 1:
        if any(a.bit & b.ancestors for a in new for b in new):
            return None  # they feed each other: see _dense_layers
        common = _common_source(network, reading, new)  # they are pieces of one value
        if common is None or common.channels is None:
            return None
        new = [common]
    region = (new[0].ancestors | new[0].bit) & reading.mask
    ops = list(network.select(region))
    if not _has_spatial_conv(ops) or not _has_nonlinearity(ops):
        return None
    return _Block("dense", reading, region, cat, new[0])


def _dense_layers(network: Network, reading: Reading, cat: Op) -> list[_Block]:
    """A cat of one value and of what several layers made of it, each of which read all that came before it (Huang et
    al., arXiv:1608.06993). Where each reads the one before it alone, it is one block of several branches instead."""
    if not _joins_channels(cat) or len(cat.data) < 3:
        return []
    first, *new = cat.data
    seen = first.bit
    outside = first.ancestors | first.bit
    blocks: list[_Block] = []
    for operand in new:
        region = (operand.ancestors | operand.bit) & reading.mask & ~outside
        ops = list(network.select(region))
        reads_all = any(
            op.role == "cat" and all(i.bit & seen for i in op.data) and len(op.data) == len(blocks) + 1 for op in ops
        )
        if (blocks and not reads_all) or not _has_spatial_conv(ops) or not _has_nonlinearity(ops):
            return []
        blocks.append(_Block("dense", reading, region, cat, operand, layered=True))
        seen |= operand.bit
        outside |= region
    return blocks


def _added_to_bypass(op: Op, reading: Reading) -> Op | None:
    """The new one of the two operands of an add, if the other is a bypass."""
    if op.role != "add" or len(op.data) != 2 or not reading.holds(op):
        return None
    new = [o for o in op.data if _bypass_source(o, reading, 0) is None]
    return new[0] if len(new) == 1 else None


def _dual_path(network: Network, reading: Reading, joins: list[Op]) -> _Block | None:
    """Several joins of one new value with what bypassed the block, which make up all that it returns (DPN)."""
    cut: set[Op] = set()
    new: list[Op] = []
    for join in joins:
        operands = join.data
        if join.role == "cat" and not _joins_channels(join):
            continue
        bypass = [o for o in operands if _bypass_source(o, reading, 0) is not None]
        rest = [o for o in operands if o not in bypass]
        if not bypass or len(rest) != 1:
            continue
        cut.add(join)
        new += rest
    if {join.role for join in cut} != {"add", "cat"} or _escapes(network, reading, reading.inputs, cut):
        return None
    common = reading.mask
    for op in new:
        common &= op.ancestors | op.bit
    candidates = [op for op in network.select(common) if op.channels is not None]
    if not candidates:
        return None
    branch = candidates[-1]
    region = (branch.ancestors | branch.bit) & reading.mask
    if not _has_spatial_conv(network.select(region)):
        return None
    return _Block("dense", reading, region, max(cut, key=lambda op: op.index), branch)


@dataclass(frozen=True, eq=False)
class _Core:
    """``depthwise conv -> norm -> activation -> pointwise conv``, the core of the inverted bottleneck (Sandler et al.,
    arXiv:1801.04381; with SE in it: Tan et al., arXiv:1807.11626): the value that goes into the projection, the operation
    that takes it, and the projection's own value."""

    value: Op
    taker: Op
    projection: Op


def _core(conv: Op) -> _Core | None:
    """The core that begins with this depthwise conv."""
    if conv.conv is None or not conv.conv.depthwise or conv.pooled:
        return None
    op, acted = conv, False
    while True:
        users = [u for u in op.users if u.role != "param"]
        gates = [u for u in users if is_gate(u)]
        if gates and all(u in gates or u.pooled for u in users):
            op = gates[0]
            continue
        pieces = [_only_user(u) for u in users if u.role == "part"]
        if len(users) == len(pieces) > 1 and all(p is not None and _pointwise(p) for p in pieces):
            joined = _only_user(pieces[0]) if pieces[0] is not None else None  # a projection in groups (MixNet)
            return _Core(op, users[0], joined) if acted and joined is not None and joined.role == "cat" else None
        if len(users) != 1:
            return None
        user = users[0]
        if _pointwise(user):
            return _Core(op, user, user) if acted else None
        if user.role == "cat":  # kernels of several sizes side by side (MixConv)
            if not all(i.conv is not None and i.conv.depthwise for i in user.data):
                return None
        elif user.role == "act":
            acted = True
        elif user.role not in ("norm", "pass", "affine", "pool", "shape") or len(user.data) != 1:
            return None
        op = user


def _projects(op: Op) -> bool:
    """Whether a pointwise conv is linear: no non-linearity follows it."""
    following = _next_after(op, ("norm", "pass", "affine", "shape"))
    return following is None or following.role != "act"


def _inverted_core(network: Network, block: _Block) -> _Core | None:
    """The core of a residual unit that is an inverted bottleneck."""
    ops = list(network.select(block.region))
    spatial = [op for op in ops if op.spatial_conv]
    if not all(op.conv is not None and op.conv.depthwise for op in spatial):
        return None
    cores = {core.projection: core for core in map(_core, spatial) if core is not None}
    if len(cores) != 1:
        return None
    projection, core = cores.popitem()
    if not projection.bit & block.region or not _projects(projection):
        return None
    later = [
        op
        for op in ops
        if op.index > projection.index and (op.conv is not None or op.role == "linear") and not op.pooled
    ]
    return None if later else core


# Blocks without a bypass ---------------------------------------------------------------------------------------------------


def _common_source(network: Network, reading: Reading, ops: Iterable[Op]) -> Op | None:
    """The last operation of the module from which all of ``ops`` come."""
    common = reading.mask
    for op in ops:
        common &= op.ancestors | op.bit
    common_ops = list(network.select(common))
    return common_ops[-1] if common_ops else None


def _multi_branch(network: Network, reading: Reading, cat: Op) -> _Block | None:
    """A channel cat of branches that come from one value; SE goes behind it, or behind the conv that fuses it."""
    if not _joins_channels(cat):
        return None
    source = _common_source(network, reading, cat.data)
    if _escapes(network, reading, [source] if source is not None else reading.inputs, {cat}):
        return None
    outside = (source.ancestors | source.bit) if source is not None else 0
    ops = list(network.select(cat.ancestors & reading.mask & ~outside))
    if not _has_spatial_conv(ops) or any(op.role == "resize" or (op.conv and op.conv.transposed) for op in ops):
        return None
    convolved = [
        o
        for o in cat.data
        if any(p.conv is not None for p in network.select((o.ancestors | o.bit) & reading.mask & ~outside))
    ]
    bypasses = [
        o
        for o in cat.data
        if o not in convolved and not (o.role == "pool" and reading.holds(o) and not o.bit & outside)
    ]
    end = _fusing_end(reading, cat, ops)
    if len(convolved) < 2 or (bypasses and end is None):
        return None
    end = end or cat
    region = (end.ancestors | end.bit) & reading.mask & ~outside
    return _Block("multi-branch", reading, region, cat, end)


def _fusing_end(reading: Reading, cat: Op, branches: list[Op]) -> Op | None:
    """Behind a cat: the last value of the pointwise conv that fuses it, with its norm and activation."""
    op, conv = cat, None
    while True:
        user = _only_user(op)
        if user is None or not reading.holds(user) or len(user.data) != 1:
            break
        if user.conv is not None and not user.conv.spatial:
            conv = conv or user
        elif user.role not in ("norm", "act", "pass", "affine"):
            break
        op = user
    if conv is None or (reading.parent is None and not _same_family(conv, branches)):
        return None
    while op.role in ("pass", "affine") and op is not conv and len(op.data) == 1:
        op = op.data[0]
    return op


def _same_family(conv: Op, branches: list[Op]) -> bool:
    """In a graph that holds many blocks, whether a conv's path says that it belongs with these."""
    paths = [_module_path(op) for op in branches if op.conv is not None]
    if any(p is None for p in [*paths, _module_path(conv)]):
        return True
    prefix = _common_prefix([p for p in paths if p is not None])
    own = _module_path(conv) or ""
    return own == prefix or own.startswith(f"{prefix}.") or not prefix


def _rep_sum(network: Network, reading: Reading, add: Op) -> _Block | None:
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
        if op.role == "add" and op.call is reading.call and len(op.data) == 2:
            stack.extend(op.data)
        else:
            leaves.append(op)
    source = _common_source(network, reading, leaves)
    if _escapes(network, reading, [source] if source is not None else reading.inputs, {add}):
        return None
    region = (add.ancestors | add.bit) & reading.mask
    if source is not None:
        region &= ~(source.ancestors | source.bit)
    ops = list(network.select(region))
    if not _has_spatial_conv(ops) or _has_nonlinearity(ops) or any(op.role in ("resize", "cat") for op in ops):
        return None
    if sum(leaf.bit & region != 0 for leaf in leaves) < 2 or (source is None and len(reading.inputs) != 1):
        return None  # a lone conv beside its input encodes positions; values of two origins are no branches
    return _Block("rep-sum", reading, region, add, add)


def _covers_its_input(conv: Op) -> bool:
    """Whether a conv leaves nothing of space: a fully-connected layer, written as a convolution."""
    before = conv.data[0].value
    assert conv.conv is not None
    dims = len(conv.conv.kernel)
    return (
        not conv.conv.transposed
        and all(s == 1 for s in conv.value.shape[-dims:])
        and before.shape[-dims:] == conv.conv.kernel
    )


def _is_prediction(network: Network, projection: Op) -> bool:
    """Whether a projection is what a head predicts: no layer of any kind comes behind it."""
    return not any(
        op.ancestors & projection.bit and op.role in ("conv", "linear", "norm", "act", "add")
        for op in network.ops[projection.index + 1 :]
    )


def _chain_units(network: Network) -> Iterator[tuple[Op, Op]]:
    """Each conv with the non-linearity that closes its unit; a depthwise-separable pair is one unit."""
    outputs = {op for reading in network.readings if reading.parent is None for op in reading.outputs}
    for conv in network.ops:
        if not conv.spatial_conv:
            continue
        if _covers_its_input(conv):
            continue
        following = _next_after(conv, ("norm", "pass", "affine", "pool"))
        if conv.conv is not None and conv.conv.depthwise:
            pair = following
            if pair is not None and pair.role == "act":
                pair = _next_after(pair, ("norm", "pass", "affine"))
            if pair is not None and _pointwise(pair) and pair.conv is not None:
                closing = _next_after(pair, ("norm", "pass", "affine", "pool"))
                if closing is not None and closing.role == "act":
                    following = closing
        if following is not None and following.role == "act" and following not in outputs:
            yield conv, following


# Names -----------------------------------------------------------------------------------------------------------------


def _module_path(op: Op) -> str | None:
    """The path, in the whole model, of the module that an operation is."""
    if op.node is None or op.node.op != "call_module":
        return None
    return f"{op.call.path}.{op.node.target}" if op.call.path else str(op.node.target)


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


def _name(network: Network, block: _Block) -> str:
    """The path of a block: that of the module in which it stands, or of one around it that holds nothing else; in a
    graph that holds more than the block, what the paths of its convolutions tell."""
    own = [op for op in network.select(block.region) if op.conv is not None and not op.pooled]
    paths = [path for path in map(_module_path, own) if path]
    outer = block.reading
    if _is_sequential(outer) or outer.call.path == "":
        held = [op for op in network.select(outer.mask) if op.spatial_conv]
        if any(not op.bit & block.region for op in held):
            prefix = _common_prefix(paths)
            return prefix if prefix != outer.call.path else (paths or [prefix])[0]
    while _is_sequential(outer) and outer.parent is not None and outer.parent.call.path:
        if any(op.conv is not None and not outer.holds(op) for op in network.select(outer.parent.mask)):
            break
        outer = outer.parent
    return outer.call.path


def _is_sequential(reading: Reading) -> bool:
    return getattr(type(reading.call.module), "forward", None) is torch.nn.Sequential.forward


# The survey --------------------------------------------------------------------------------------------------------------


class _Surveyor:
    def __init__(self, network: Network, placement: str) -> None:
        self.network = network
        self.placement = placement
        self.survey = Survey()
        self.found = 0  # the bits of all blocks with a bypass and all inverted ones, whether they get SE or not
        self.sited = 0  # the bits of the values behind which SE goes, and of blocks that have attention
        self.covered = 0  # the bits of the blocks that get SE
        self.unplaced: dict[
            str, tuple[str, int]
        ] = {}  # blocks for which there is no place; one around them may have one

    def run(self) -> Survey:
        self.blocks_with_bypass()
        self.inverted_without_bypass()
        self.joined_branches()
        if not self.survey.spots and not self.survey.attended and not self.unplaced:
            self.chains()
        for name, (reason, region) in self.unplaced.items():
            if not region & self.covered:
                self.leave(name, reason)
        return self.survey

    def blocks_with_bypass(self) -> None:
        network = self.network
        for reading in reversed(network.readings):
            own = [
                op
                for op in network.ops[reading.start : reading.end]
                if op.call is reading.call and op.role in ("add", "cat")
            ]
            before = self.found
            for op in reversed(own):  # the last cat of a dense block is the one of all its layers
                for block in _dense_layers(network, reading, op):
                    if not block.region & self.sited:
                        self.place(block, self.dense_place(block) if self.placement == "auto" else None)
            for op in own:
                residual, dense = _residual(network, reading, op), _dense(network, reading, op)
                if residual is not None and not residual.region & self.sited:
                    self.residual(residual)
                if dense is not None and not dense.region & self.sited:
                    self.place(dense, (reading, self.branch_end(dense)) if self.placement == "auto" else None)
            if self.found == before and len(own) > 1:
                dual = _dual_path(network, reading, own)
                if dual is not None and not dual.region & self.sited:
                    self.place(dual, (dual.reading, dual.branch) if self.placement == "auto" else None)

    def residual(self, block: _Block) -> None:
        core = _inverted_core(self.network, block)
        if core is not None:
            block.kind = "inverted"
        if core is not None and self.placement == "auto":
            self.place(block, self.edge(core.value, core.taker))
            return
        if self.placement in ("auto", "standard"):
            self.place(block, (block.reading, self.branch_end(block)))
        elif self.placement == "post":
            following = _only_user(block.join)
            acted = following is not None and following.role == "act" and block.reading.node_of(following) is not None
            self.place(block, (block.reading, following if acted and following is not None else block.join))
        elif self.placement == "identity":
            assert block.skip is not None
            self.place(block, (block.reading, block.skip), {block.join.node})
        elif self.placement == "pre":
            assert block.source is not None
            source = block.source
            if not source.bit & block.branch.ancestors:  # branch and skip are two inputs
                source = next((i for i in block.reading.inputs if i.bit & block.branch.ancestors), source)
            around = {block.reading.node_around(op) for op in self.network.select(block.region)}
            skip_side = self.network.select(
                0
                if block.skip is None
                else (block.skip.ancestors | block.skip.bit) & block.reading.mask & ~block.region
            )
            self.place(block, (block.reading, source), around - {block.reading.node_around(op) for op in skip_side})
        else:
            self.place(block, self.spatial_place(block))

    def branch_end(self, block: _Block) -> Op:
        """The branch's last value before stochastic depth and layer scale."""
        return self.before(block.branch, block.reading, ("pass", "affine"))

    @staticmethod
    def before(op: Op, reading: Reading | None, roles: tuple[str, ...]) -> Op:
        """Follow a value back through operations of these roles that stand in the module's own graph."""
        while op.role in roles and len(op.data) == 1 and _only_user(op.data[0]) is op:
            if reading is None or reading.node_of(op.data[0]) is None:
                break
            op = op.data[0]
        return op

    def spatial_place(self, block: _Block) -> tuple[Reading | None, Op]:
        """Inside the branch: after its spatial conv's norm and activation."""
        for conv in reversed([op for op in self.network.select(block.region) if op.spatial_conv]):
            op, acted = conv, False
            user = _only_user(op)
            while (
                user is not None
                and user.bit & block.region
                and user.role in ("norm", "act", "pass", "affine", "cat", "shape")
            ):
                op, acted = user, acted or user.role == "act"
                user = _only_user(op)
            if user is not None and (acted or _pointwise(user)):
                return self.edge(op, user)
        return block.reading, self.branch_end(block)

    def edge(self, value: Op, taker: Op) -> tuple[Reading | None, Op]:
        """The module in whose own graph a value goes from one operation to another."""
        reading = self.network.innermost([value, taker])
        return reading, self.before(value, reading, ("pass",))

    def dense_place(self, block: _Block) -> tuple[Reading | None, Op]:
        """A dense layer that is a module of its own gets its SE itself."""
        node = block.reading.node_of(block.branch)
        if block.layered and node in block.reading.children:
            child = block.reading.children[node]
            if child.node_of(block.branch) is not None:
                block.reading = child
        return block.reading, self.branch_end(block)

    def inverted_without_bypass(self) -> None:
        for conv in list(self.network.ops):
            if conv.bit & self.found:
                continue
            core = _core(conv)
            if core is None:
                continue
            reading = self.network.innermost([conv, core.projection])
            if reading is None or not _projects(core.projection) or core.projection.bit & self.found:
                continue
            if _is_prediction(self.network, core.projection):
                continue
            region = (core.projection.ancestors | core.projection.bit) & ~conv.ancestors
            block = _Block("inverted", reading, region, core.projection, core.projection)
            self.place(block, self.edge(core.value, core.taker) if self.placement == "auto" else None)

    def joined_branches(self) -> None:
        network = self.network
        taken = self.found
        for reading in network.readings:
            own = [op for op in network.ops[reading.start : reading.end] if op.call is reading.call]
            for op in reversed(own):
                if op.bit & taken:
                    continue
                block = self.joined(reading, op) or _rep_sum(network, reading, op)
                if block is None or block.region & taken:
                    continue
                taken |= block.region
                where = self.outside_of_sum(block) if block.kind == "rep-sum" else (block.reading, block.branch)
                self.place(block, where if self.placement == "auto" else None)

    def joined(self, reading: Reading, cat: Op) -> _Block | None:
        """A multi-branch block; the conv that fuses its branches may stand further out than the cat."""
        block = _multi_branch(self.network, reading, cat)
        while block is None and reading.parent is not None and reading.outputs == [cat]:
            reading = reading.parent
            block = _multi_branch(self.network, reading, cat)
        return block

    def outside_of_sum(self, block: _Block) -> tuple[Reading | None, Op]:
        """Behind the sum of a re-parameterisable block and its norm. Where that is all that a module does, the module is
        one conv in disguise and may be replaced by that conv: SE goes outside of it."""
        reading, op = block.reading, block.branch
        user = _only_user(op)
        while (
            user is not None and reading.holds(user) and user.role in ("norm", "pass", "affine") and len(user.data) == 1
        ):
            op, user = user, _only_user(user)
        while reading.outputs == [op] and reading.parent is not None:
            reading = reading.parent
        return reading, op if reading is not block.reading else block.branch

    def chains(self) -> None:
        for conv, act in _chain_units(self.network):
            reading = self.network.innermost([conv, act])
            if reading is None:
                continue
            region = (act.ancestors | act.bit) & ~conv.ancestors
            block = _Block("chain", reading, region, act, act)
            self.place(block, (reading, act) if self.placement == "auto" else None)

    def place(
        self, block: _Block, where: tuple[Reading | None, Op] | None, users: set[fx.Node | None] | None = None
    ) -> None:
        """Record a spot for a block, or why there is none."""
        self.found |= block.region | block.join.bit
        name = _name(self.network, block)
        if any(is_gate(op) for op in self.network.select(block.region)) or (
            where is not None and _gated_after(where[1])
        ):
            self.sited |= block.region
            self.survey.attended += 1
            self.leave(name, HAS_ATTENTION)
            return
        if where is None:
            self.leave(name, f"placement {self.placement!r} is for residual units, this block is of kind {block.kind}")
            return
        reading, op = where
        node = None
        if reading is not None:
            reading, node = self.locate(reading, op)
        problem = None
        if reading is None or node is None:
            problem = "the value that SE should recalibrate does not appear in the graph of any of its modules"
        elif op.channels is None:
            problem = f"which dim of {node.name} holds the channels can't be told"
        elif op.channels < 2:
            problem = f"{node.name} has one channel only"
        if problem is not None or reading is None or node is None:
            self.unplaced[name] = (problem or "", block.region)
            return
        self.sited |= op.bit
        self.covered |= block.region
        chosen = None if users is None else frozenset(u for u in users if u is not None)
        self.survey.spots.append(Spot(name, block.kind, reading, node, op, chosen))

    def locate(self, reading: Reading, op: Op) -> tuple[Reading, fx.Node | None]:
        """The node that is a value: in this module's own graph, or in that of the module inside in which it appears."""
        node = reading.node_of(op)
        if node is None:
            node = next((n for n, structure in reading.ops.items() if structure is op), None)
        if node is None and reading.holds(op):
            inner = next((child for child in reading.children.values() if child.holds(op)), None)
            if inner is not None:
                return self.locate(inner, op)
        return reading, node

    def leave(self, block: str, reason: str) -> None:
        self.survey.skipped.setdefault(block, reason)


def survey(network: Network, placement: str = "auto") -> Survey:
    """Find the convolutional blocks of a network and where SE goes in each."""
    result = _Surveyor(network, placement).run()
    result.spots.sort(key=lambda spot: spot.op.index)
    known = [spot.block for spot in result.spots] + list(result.skipped)
    for call, reason in network.failures.items():
        inside = any(call.path == block or call.path.startswith(f"{block}.") for block in known)
        if not inside and _own_spatial_conv(call):
            result.skipped.setdefault(call.path, reason)
    return result


def _own_spatial_conv(call: Call) -> bool:
    """Whether a module that can't be traced calls a spatial convolution itself."""
    return any(
        isinstance(child.module, torch.nn.modules.conv._ConvNd) and max(child.module.kernel_size) > 1
        for child in call.children
    )
