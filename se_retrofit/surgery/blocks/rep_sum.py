"""Sums that are one convolution in disguise."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import only_user
from ..record.graph import Call, Op, Record
from ..record.joins import LEARNED
from .block import Block, Target
from .questions import common_source, escapes, has_nonlinearity, has_spatial_conv, next_after, own_operations

__all__ = ["reparameterisable_sums", "summed_branches"]


def reparameterisable_sums(record: Record) -> Iterator[Block]:
    """A sum of linear branches, one convolution in disguise: SE goes after the sum, before the activation, so that the
    branches can still be fused (RepVGG, Ding et al., arXiv:2101.03697; MobileOne)."""
    for call in record.calls:
        for add in reversed(own_operations(record, call)):
            region = summed_branches(record, call, add)
            if region is not None:
                yield Block("rep-sum", call, region, add, add, target=_outside(call, add))


def summed_branches(record: Record, call: Call, add: Op) -> int | None:
    """The operations of the linear branches that an add sums up, as a bit set; None if it is no such sum."""
    if add.role != "add" or len(add.data) != 2:
        return None
    following = next_after(add, ("pass",))
    if following is not None and following.role == "add":
        return None  # not the last of the sum
    leaves, stack = [], list(add.data)
    while stack:
        op = stack.pop()
        while (op.role == "pass" or (op.role == "affine" and op.name == "add")) and len(op.data) == 1:
            op = op.data[0]  # sum([a, b]) begins with 0 + a
        if op.role == "add" and op.call is call and len(op.data) == 2:
            stack.extend(op.data)
        else:
            leaves.append(op)
    source = common_source(record, call, leaves)
    if escapes(record, call, [source] if source is not None else call.inputs, {add}):
        return None
    region = call.region(add, 0 if source is None else source.lineage)
    ops = list(record.select(region))
    if not has_spatial_conv(ops) or has_nonlinearity(ops) or any(op.role in ("resize", "cat") for op in ops):
        return None
    if sum(_is_weighted(record, leaf, region) for leaf in leaves) < 2 or (source is None and len(call.inputs) != 1):
        return None  # a lone conv beside its input is none; values of two origins are no branches
    return region


def _is_weighted(record: Record, leaf: Op, region: int) -> bool:
    """Whether a branch has weights: one without is a shortcut, such as what a pixel-unshuffle makes of the input."""
    return any(op.role in (*LEARNED, "affine") for op in record.select(leaf.lineage & region))


def _outside(call: Call, add: Op) -> Target:
    """Behind the sum of a re-parameterisable block and its norm. Where that is all that a module does, the module is
    one conv in disguise and may be replaced by that conv: SE goes outside of it."""
    inner, op, user = call, add, only_user(add)
    while user is not None and call.holds(user) and user.role in ("norm", "pass", "affine") and len(user.data) == 1:
        op, user = user, only_user(user)
    while call.outputs == [op] and call.parent is not None:
        call = call.parent
    if call is not inner:
        return Target(call, op)
    op, user = add, only_user(add)
    while user is not None and user.role == "affine" and user.name == "add":  # of a branch that is the number 0
        op, user = user, only_user(user)
    return Target(call, op)
