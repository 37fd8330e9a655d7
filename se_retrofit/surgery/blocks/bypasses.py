"""Paths around an add, and which of them show that it does not belong to a residual unit."""

from __future__ import annotations

from collections.abc import Iterable

from ..record.facts import real_users
from ..record.graph import Call, Op, Record
from .questions import TRANSPARENT, derives, has_nonlinearity, resizes

_COLLECTING = (*TRANSPARENT, "add", "cat", "pool")


def all_pass(record: Record, call: Call, sources: Iterable[Op], add: Op, region: int) -> bool:
    """Return whether every path from some values to the output of a module passes an add. Some paths don't count:

    One that ends where all stages of a stream are collected: in their sum or concat, or in a list that is returned
    (but a sum of linear branches, or of the outputs of pools and branches, is one of branches). A path to a second
    output that is computed in the branch only (WaveNet's skip output, van den Oord et al., arXiv:1609.03499), summed
    with others, an input, or what the shortcut is computed from. One by which only the branch weights the sum (SPAN, Wan et al., arXiv:2311.12770).
    """
    sources = list(sources)
    reached = set(sources)
    stream = any(source in add.data for source in sources) and has_nonlinearity(record.select(region))
    collected = _collected(call, sources, add, region) if stream else set()
    excused = reached | collected
    left: set[Op] = set()  # values computed in the branch that go unchanged to another sum
    for op in record.ops[call.start : call.end]:
        ways = [i for i in op.takes if i in reached and not (op in collected and i in excused)]
        if op is add or not ways or _is_weighed(record, call, op, sources, add, region):
            continue
        if stream and op.role in _COLLECTING and not op.bit & region and all(i.bit & region or i in left for i in ways):
            if op.role == "add" and len(op.data) > 1:
                continue
            left.add(op)
        reached.add(op)
    bypassing = [output for output in call.outputs if output in reached]
    after = [output for output in call.outputs if output.lineage & add.bit]
    if not bypassing:
        return True
    if not after or any(output in after for output in bypassing):
        return False
    shortcut = 0
    for skip in add.data:
        if not skip.bit & region:
            shortcut |= skip.lineage
    # then another output may be another level of a pyramid, not this unit's
    resized = any(map(resizes, record.select(region)))
    return all(
        output in sources
        or (
            call.parent is not None
            and (output.bit & (region | shortcut) or all(value.lineage & region for value in output.data))
            and not (resized and output.shape[2:] != add.shape[2:])
        )
        for output in bypassing
    )


def _is_weighed(record: Record, call: Call, op: Op, sources: list[Op], add: Op, region: int) -> bool:
    """Return whether an operation weights the result of an add by a value computed from its branch only."""
    if op.role != "mul" or len(op.data) != 2:
        return False
    branch = record.ops[region.bit_length() - 1]
    for total, weight in (op.data, op.data[::-1]):
        if total.lineage & add.bit and not weight.lineage & add.bit:
            made = weight.bit & region == 0 and bool(weight.ancestors & branch.bit)
            return made and not any(
                derives(record, call, value, source, but=cut)
                for source in sources
                for value, cut in ((weight, branch), (total, add))
            )
    return False


def _collected(call: Call, sources: list[Op], add: Op, region: int) -> set[Op]:
    """Return the joins that take a unit's input and output unchanged, and what lies between that input and them."""
    ours = {op for op in _gathered([add], call, 0) if op.role in ("add", "cat") and len(op.data) > 1 and op is not add}
    found: set[Op] = set()
    for op in sorted(_gathered(sources, call, region | add.bit), key=lambda op: -op.index):
        if op in ours or any(user in found for user in op.users):
            found.add(op)
    return found.difference(sources)


def _gathered(values: list[Op], call: Call, but: int) -> set[Op]:
    """Return what a module computes from some values without a learned layer or an activation."""
    reached, waiting = set(values), list(values)
    for value in waiting:
        for user in real_users(value):
            if user not in reached and not user.bit & but and call.holds(user) and user.role in _COLLECTING:
                reached.add(user)
                waiting.append(user)
    return reached
