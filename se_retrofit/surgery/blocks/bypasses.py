"""Ways past an add, and which of them keep it from being that of a residual unit."""

from __future__ import annotations

from collections.abc import Iterable

from ..record.facts import real_users
from ..record.graph import Call, Op, Record
from .questions import TRANSPARENT, has_nonlinearity

__all__ = ["all_pass", "derives"]

_COLLECTING = (*TRANSPARENT, "add", "cat", "pool")


def all_pass(record: Record, call: Call, sources: Iterable[Op], add: Op, region: int) -> bool:
    """Whether every way from some values to what a module returns passes an add, as far as ways count.

    None counts that ends where all stages of a stream are collected: their sum or concat, a list that is returned (but a sum of
    linear branches is one of branches). Nor does a second output that is made in the branch alone (WaveNet's skip output, van
    den Oord et al., arXiv:1609.03499), or is what the module was given and hands on.
    """
    sources = list(sources)
    reached = set(sources)
    collected = _collected(record, call, sources, add, region)
    for op in record.ops[call.start : call.end]:
        if op is not add and op not in collected and any(i in reached for i in op.takes):
            reached.add(op)
    bypassing = [output for output in call.outputs if output in reached]
    after = [output for output in call.outputs if (output.ancestors | output.bit) & add.bit]
    if not bypassing:
        return True
    if not after or any(output in after for output in bypassing):
        return False
    return all(
        output in sources or (call.parent is not None and (output.bit & region or _all_from(output, region)))
        for output in bypassing
    )


def _all_from(op: Op, region: int) -> bool:
    """Whether every operand of an operation is computed inside a region, so that none bypasses it (as in the concat of a dual path)."""
    return bool(op.data) and all((o.ancestors | o.bit) & region for o in op.data)


def _collected(record: Record, call: Call, sources: list[Op], add: Op, region: int) -> set[Op]:
    """The joins that take both the unit's input and its output, each as it is."""
    ours = _joins_of([add], call, 0) if has_nonlinearity(record.select(region)) else set()
    return {join for join in _joins_of(sources, call, region | add.bit) if join in ours}


def _joins_of(values: list[Op], call: Call, but: int) -> set[Op]:
    """The adds and concats of a module that take one of some values, or what was made of it without a learned layer."""
    reached, waiting = set(values), list(values)
    for value in waiting:
        for user in real_users(value):
            if user not in reached and not user.bit & but and call.holds(user) and user.role in _COLLECTING:
                reached.add(user)
                waiting.append(user)
    return {op for op in reached if op.role in ("add", "cat") and len(op.data) > 1 and op not in values}


def derives(record: Record, call: Call, value: Op, source: Op) -> bool:
    """Whether a module computes one value from another."""
    reached = {source}
    for op in record.ops[call.start : value.index + 1]:
        if any(i in reached for i in op.takes):
            reached.add(op)
    return value in reached
