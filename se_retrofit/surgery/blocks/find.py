"""From the blocks that the recognisers yield to the places where SE goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from ..record.graph import Call, Op, Record
from .block import Block, Target
from .names import name_of
from .place import Found, Place, problem_of
from .placements import PLACEMENTS
from .questions import gated_after, is_gate
from .table import RECOGNISERS, Recogniser

__all__ = ["find_places"]

HAS_ATTENTION = "has channel attention already"


def find_places(record: Record, placement: str = "auto", recognisers: Sequence[Recogniser] = RECOGNISERS) -> Found:
    """Find the convolutional blocks of a record (that ``operations.read`` has read) and where SE goes in each."""
    finder = _Finder(record, placement)
    for nests, rows in groupby(recognisers, lambda row: row.nests):
        if nests:
            blocks = [block for row in rows for block in row.find(record)]
            finder.add_all(sorted(blocks, key=lambda block: -block.call.start), nests=True)
            continue
        for row in rows:
            if not row.alone or finder.nothing:
                finder.add_all(row.find(record), nests=False)
    return finder.result()


class _Finder:
    def __init__(self, record: Record, placement: str) -> None:
        self.record = record
        self.placement = placement
        self.found = Found()
        self.taken = 0  # the bits of all blocks, whether they get SE or not
        self.sited = 0  # the bits of the values behind which SE goes, and of blocks that have attention
        self.covered = 0  # the bits of the blocks that get SE
        # blocks for which there is no place, with the reason and their bits; one around them may have one
        self.unplaced: dict[str, tuple[str, int]] = {}
        self.masks: dict[int, int] = {}  # the bits of all calls of a module
        for call in record.calls:
            self.masks[id(call.module)] = self.masks.get(id(call.module), 0) | call.mask

    @property
    def nothing(self) -> bool:
        return not (self.found.places or self.found.attended or self.unplaced)

    def result(self) -> Found:
        for name, (reason, region) in self.unplaced.items():
            if not region & self.covered:
                self.leave(name, reason)
        self.found.places.sort(key=lambda place: place.op.index)
        return self.found

    def add_all(self, blocks: Iterable[Block], nests: bool) -> None:
        for block in blocks:
            if block.region & (self.sited if nests else self.taken):
                continue
            if not nests and self.masks[id(block.call.module)] & ~block.call.mask & self.taken:
                continue  # another call of the same module is part of a block
            self.add(block)

    def add(self, block: Block) -> None:
        """Note the place for a block, or why there is none."""
        self.taken |= block.region | block.join.bit
        name = name_of(self.record, block)
        target = PLACEMENTS[self.placement](self.record, block)
        gated = target is not None and gated_after(target.op)
        if gated or any(is_gate(op) for op in self.record.select(block.region)):
            self.sited |= block.region
            self.found.attended += 1
            self.leave(name, HAS_ATTENTION)
        elif target is None:
            self.leave(name, f"placement {self.placement!r} is for residual units, this block is of kind {block.kind}")
        else:
            self.place(block, name, target)

    def place(self, block: Block, name: str, target: Target) -> None:
        op = target.op
        call = None if target.call is None else _where_shown(target.call, op)
        if call is None:
            problem: str | None = (
                "the value that SE should recalibrate does not appear in the code of any of its modules"
            )
        else:
            problem = problem_of(op)
        if call is None or problem is not None:
            self.unplaced[name] = (str(problem), block.region)
            return
        self.sited |= op.bit
        self.covered |= block.region
        self.found.places.append(Place(name, block.kind, call, op, target.users, self.layers(block)))

    def layers(self, block: Block) -> frozenset[str]:
        return frozenset(
            source.path
            for op in self.record.select(block.region)
            for source in (op, *op.inputs)
            if source.path is not None
            and (source.role == "param" or op.conv is not None or op.role in ("linear", "norm"))
        )

    def leave(self, block: str, reason: str) -> None:
        self.found.skipped.setdefault(block, reason)


def _where_shown(call: Call, op: Op) -> Call | None:
    """The call in whose code a value appears: this one, or the one inside of it that makes the value."""
    inner: Call | None = call
    while inner is not None and not inner.shows(op):
        if not inner.holds(op):
            return call if op in call.inputs else None
        inner = inner.child_with(op)
    return inner
