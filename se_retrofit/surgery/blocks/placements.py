"""Where SE goes in a block: by default, and in the paper's other variants (Hu et al., section 6.4, figure 5)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..record.facts import only_user
from ..record.graph import Record
from .block import Block, Target
from .questions import before, edge, is_pointwise


def auto(record: Record, block: Block) -> Target | None:
    """Where the block's recogniser puts it: on what the block has newly computed, once, at the last value before it
    joins what bypassed the block."""
    return block.target or branch_end(record, block)


def branch_end(record: Record, block: Block) -> Target:
    """The branch's last value before stochastic depth and layer scale, even if these are before a last permutation."""
    end = before(block.branch, block.call, ("pass", "affine"))
    moved = before(end, block.call, ("shape",))
    unscaled = before(moved, block.call, ("pass", "affine"))
    return Target(block.call, unscaled if unscaled is not moved and unscaled.channels is not None else end)


def standard(record: Record, block: Block) -> Target | None:
    """At the end of the branch, even in an inverted bottleneck."""
    return None if block.skip is None else branch_end(record, block)


def pre(record: Record, block: Block) -> Target | None:
    """Before the branch."""
    source, branch = block.source, block.branch
    if source is None:
        return None
    if not source.bit & branch.ancestors:  # branch and skip are two inputs
        source = next((i for i in block.call.inputs if i.bit & branch.ancestors), source)
    return Target(block.call, source, frozenset(u for u in source.users if u.bit & block.region))


def post(record: Record, block: Block) -> Target | None:
    """After the add and its activation."""
    if block.skip is None:
        return None
    following = only_user(block.join)
    acted = following is not None and following.role == "act" and block.call.shows(following)
    return Target(block.call, following if acted and following is not None else block.join)


def identity(record: Record, block: Block) -> Target | None:
    """On the skip."""
    return None if block.skip is None else Target(block.call, block.skip, frozenset([block.join]))


_INSIDE = ("norm", "act", "pass", "affine", "cat", "shape")


def spatial(record: Record, block: Block) -> Target | None:
    """Inside the branch: after its spatial conv's norm and activation."""
    if block.skip is None:
        return None
    for conv in reversed([op for op in record.select(block.region) if op.spatial_conv]):
        op, acted = conv, False
        user = only_user(op)
        while user is not None and user.bit & block.region and user.role in _INSIDE:
            op, acted = user, acted or user.role == "act"
            user = only_user(op)
        if user is not None and (acted or is_pointwise(user)):
            return edge(op, user)
    return branch_end(record, block)


def apart_from_concat(target: Target) -> Target:
    """Return the place before a batch norm instead of the one between it and a concat. From a concat, a value gets its
    gradient as a slice, from SE as a dense tensor; on CPUs, a batch norm sums the two up in another order, so that its
    gradients would not be equal bit for bit."""
    norm = target.op
    user = only_user(norm)
    while user is not None and user.role in ("add", "pass", "affine"):
        user = only_user(user)
    batch_norm = isinstance(norm.module, nn.modules.batchnorm._BatchNorm) or "batch_norm" in norm.name
    if batch_norm and user is not None and user.role == "cat" and only_user(norm.data[0]) is norm:
        return Target(target.call, norm.data[0])
    return target


PLACEMENTS: dict[str, Callable[[Record, Block], Target | None]] = {
    "auto": auto,
    "standard": standard,
    "pre": pre,
    "post": post,
    "identity": identity,
    "3x3": spatial,
}
