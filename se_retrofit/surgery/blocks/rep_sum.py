"""Sums that are equivalent to a single convolution."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import LEARNED, only_user
from ..record.graph import Call, Op, Record
from .block import Block, Target
from .questions import common_source, escapes, has_nonlinearity, has_spatial_conv, next_after, own_operations


def reparameterisable_sums(record: Record) -> Iterator[Block]:
    """A sum of linear branches, equivalent to a single convolution: SE goes after the sum, before the activation, so
    that the branches can still be fused (RepVGG, Ding et al., arXiv:2101.03697; MobileOne)."""
    for call in record.calls:
        for add in reversed(own_operations(record, call)):
            region = summed_branches(record, call, add)
            if region is not None:
                yield Block("rep-sum", call, region, add, add, target=_outside(call, add))


def summed_branches(record: Record, call: Call, add: Op) -> int | None:
    """Return the operations of the linear branches that an add sums, as a bit set; None if it is not such a sum."""
    if add.role != "add" or len(add.data) != 2:
        return None
    following = next_after(add, ("pass",))
    if following is not None and following.role == "add":
        return None  # not the last add of the sum
    leaves, stack = [], list(add.data)
    while stack:
        op = stack.pop()
        while (op.role == "pass" or (op.role == "affine" and op.name == "add")) and len(op.data) == 1:
            op = op.data[0]  # sum([a, b]) starts with 0 + a
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
    branches = [record.select(leaf.lineage & region) for leaf in leaves]
    weighted = [any(op.role in (*LEARNED, "affine") for op in branch) for branch in branches]
    if sum(weighted) < 2 or (source is None and len(call.inputs) != 1):
        return None  # a lone conv beside its input (or that, unshuffled) is not a sum of branches; nor are values of two origins
    return region


def _outside(call: Call, add: Op) -> Target:
    """Return the target after the sum of a re-parameterisable block and its norm. A module that does nothing else may
    be replaced by the equivalent convolution, so SE goes outside it."""
    inner, op, user = call, add, only_user(add)
    while user is not None and call.holds(user) and user.role in ("norm", "pass", "affine") and len(user.data) == 1:
        op, user = user, only_user(user)
    while call.outputs == [op] and call.parent is not None:
        call = call.parent
    if call is not inner:
        return Target(call, op)
    op, user = add, only_user(add)
    while user is not None and user.role == "affine" and user.name == "add":  # if a branch is the number 0
        op, user = user, only_user(user)
    return Target(call, op)
