"""From the blocks that the recognisers yield to the places where SE goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from ..operations import only_user
from ..record import Call, Op, Record
from .block import Block, Target
from .names import name_of, other_names
from .placements import PLACEMENTS
from .questions import gated_after, is_gate
from .table import RECOGNISERS, Recogniser

__all__ = ["Found", "Place", "find_places"]

HAS_ATTENTION = "has channel attention already"


@dataclass(eq=False)
class Place:
    """A place for SE: on the value that ``op`` makes, as it appears in the code of the module that ``call`` called.

    Attributes:
        block, kind: path and kind of the block.
        users: the operations that get the recalibrated value; None means all that come after.
        names: paths beside the block's by which it may be asked for.
        layers: the paths of the modules and parameters that make the block: those of another call of the same block are
            the same, and only with such a one does it share its SE.
    """

    block: str
    kind: str
    call: Call
    op: Op
    users: frozenset[Op] | None = None
    names: tuple[str, ...] = ()
    layers: frozenset[str] = frozenset()

    @property
    def channels(self) -> int:
        assert self.op.channels is not None
        return self.op.channels

    @property
    def overwritten(self) -> bool:
        """Whether the record itself overwrites the value next (``out += identity``): then SE may do so, too."""
        user = only_user(self.op)
        return self.users is None and user is not None and user.inplace and user.inputs[:1] == (self.op,)


@dataclass(eq=False)
class Found:
    """What was found in a record: where SE goes, and which blocks are skipped and why."""

    places: list[Place] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    attended: int = 0  # blocks that have channel attention already


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
            problem = "the value that SE should recalibrate does not appear in the code of any of its modules"
        elif op.channels is None:
            problem = f"it is not known which dim of the output of {op.path or op.name} holds the channels"
        elif op.channels < 2:
            problem = f"the output of {op.path or op.name} has only one channel"
        elif not op.dtype.is_floating_point:
            problem = f"the output of {op.path or op.name} is of dtype {op.dtype}; SE is for real floating-point values"
        else:
            self.sited |= op.bit
            self.covered |= block.region
            names, layers = other_names(self.record, block), self.layers(block)
            self.found.places.append(Place(name, block.kind, call, op, target.users, names, layers))
            return
        self.unplaced[name] = (problem, block.region)

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
