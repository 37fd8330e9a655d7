"""A check that a retrofitted network does what the original does, plus SE, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...attention import Inserted
from ..blocks.block import Place
from ..record.graph import Call, Op, Record


@dataclass(eq=False)
class Findings:
    """The differences between two records.

    Attributes:
        wrong: what is wrong with the position of an SE module, by its path.
        called: paths of the SE modules that were called at all.
        different: whether the retrofitted network does anything else than the original.
        broke_off: the error that it raised, if any.
        again: whether it has to be changed and compared once more.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    different: bool = False
    broke_off: str | None = None
    again: bool = False

    @property
    def right(self) -> bool:
        return not (self.wrong or self.different or self.again)


def compare_records(before: Record, after: Record, expected: Mapping[str, list[Place]]) -> Findings:
    """Compare the record of a network with that of its retrofitted copy.

    Args:
        before, after: the records, for the same inputs in the same mode.
        expected: the places (in ``before``) where each SE module should scale, by its path.
    """
    different = Findings(different=True, broke_off=after.broke_off)
    same: dict[Op, Op] = {}  # operations of the retrofitted network, and the same ones of the original
    scaled: dict[str, list[tuple[Op, Op]]] = {}  # by path: SE's input, and SE's own operation
    index = 0
    for op in after.ops:
        if isinstance(op.module, Inserted) and op.path is not None and op.path in expected:
            given = op.inputs[0]
            same[op] = same[given]
            scaled.setdefault(op.path, []).append((given, op))
            continue
        if index == len(before.ops):
            return different
        original = before.ops[index]
        early = _taken_early(op, original, same)
        if early is not None:
            return Findings(wrong={early: OVERWRITTEN}, called={early})
        if _signature(op) != _signature(original) or tuple(same[i] for i in op.inputs) != original.inputs:
            return different
        same[op] = original
        index += 1
    if index < len(before.ops):
        return different
    for call, twin in zip(before.calls, after.calls, strict=False):
        if call.path != twin.path or call.outputs != [same[o] for o in twin.outputs]:
            return different
    takers = _Takers(after, {se for calls in scaled.values() for _, se in calls})
    problems = {path: _problem(places, scaled.get(path, []), same, takers) for path, places in expected.items()}
    return Findings({path: problem for path, problem in problems.items() if problem}, set(scaled))


NOT_ONE_VALUE = "the value that SE should recalibrate is not the result of one expression"
SEVERAL_TIMES = "the code that makes the value runs several times, and not each time as a block of this kind"
OVERWRITTEN = "the value that SE should recalibrate is overwritten in place, and the code names it before that"


def _taken_early(op: Op, original: Op, same: Mapping[Op, Op]) -> str | None:
    """Return the path of the SE module through which an operation takes a value that is overwritten in between."""
    if len(op.inputs) == len(original.inputs):
        for taken, wanted in zip(op.inputs, original.inputs, strict=True):
            if isinstance(taken.module, Inserted) and wanted.inplace and same[taken] in wanted.inputs:
                return taken.path
    return None


class _Takers:
    """The users of values in a retrofitted network. SE modules pass values on, so several can be tried on one value."""

    def __init__(self, record: Record, ses: set[Op]) -> None:
        self._ses = ses
        self._users: dict[Op, list[Op]] = {}
        for op in record.ops:
            for source in dict.fromkeys(op.inputs):
                self._users.setdefault(source, []).append(op)
        self._returned = {output for call in record.calls for output in call.outputs}

    def of(self, value: Op, but: Op | None = None) -> list[Op]:
        found = []
        for user in self._users.get(value, []):
            if user is not but:
                found += self.of(user, but) if user in self._ses else [user]
        return found

    def any_of(self, value: Op) -> bool:
        return value in self._returned or value in self._users


def _signature(op: Op) -> tuple[object, ...]:
    return op.name, op.shape, op.dtype, op.path, op.call.path, op.inplace, _plain((op.args, op.kwargs))


def _plain(value: object) -> object:
    """Convert arguments of an operation to data that can be compared."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, complex)):
        return repr(value)  # nan is not equal to itself
    if value is None or isinstance(value, (int, str, torch.dtype, torch.layout, torch.memory_format)):
        return value
    return type(value)


def _like(op: Op, places: list[Place], calls: set[Call]) -> bool:
    """Return whether an operation is that of a place in another call of the module: RAFT's first iteration, whose flow
    is constant, is the same block as the others."""
    if op.call in calls:
        return False
    calls.add(op.call)
    kind = (op.name, op.path, op.call.path, op.channel_dim, op.channels)
    return any(kind == (p.op.name, p.op.path, p.op.call.path, p.op.channel_dim, p.op.channels) for p in places)


def _problem(places: list[Place], scaled: list[tuple[Op, Op]], same: dict[Op, Op], takers: _Takers) -> str | None:
    """Describe what is wrong with the calls of an SE module, by the users of each value and by what is returned."""
    if not scaled:
        return "its SE would not be called" if places else None
    wanted = {place.op: place for place in places}
    calls = {place.op.call for place in places}
    for given, se in scaled:
        place = wanted.pop(same[given], None)
        if place is None and _like(same[given], places, calls):
            place = places[0]
        if place is None:
            several = same[given] in {p.op for p in places} or len(scaled) > len(places)
            return SEVERAL_TIMES if several else NOT_ONE_VALUE
        if place.users is not None:
            if {same[u] for u in takers.of(se)} != set(place.users):
                return "the operand that SE should recalibrate can't be told apart from the others"
            continue
        if any(user.index > se.index for user in takers.of(given, but=se)):
            return "part of its code would use the value before SE has scaled it"
        if not takers.any_of(se):
            return "the value that SE should recalibrate is changed in place, under an unknown name"
    if wanted:
        return "different code produces the value in another call"
    return None
