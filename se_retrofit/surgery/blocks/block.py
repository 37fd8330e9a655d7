"""The result of a recogniser: a convolutional block, described by what its graph does; and the places for SE."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..record.facts import only_user
from ..record.graph import Call, Op


@dataclass(frozen=True, eq=False)
class Target:
    """A value that SE could recalibrate: that of ``op``, as it appears in the code of the module that ``call`` called, for
    ``users`` (None: for all users)."""

    call: Call
    op: Op
    users: frozenset[Op] | None = None


@dataclass(eq=False)
class Block:
    """A convolutional block.

    Attributes:
        kind: its kind, in a word for users: ``"residual"``.
        call: the call of the module in whose code the block ends.
        region: the operations that the block newly computes, as a bit set of their indices.
        branch: the last value that it newly computes.
        join: the operation that joins this value with what bypassed the block; ``branch`` if nothing does.
        skip, source: for a residual unit, the value that is added to the branch, and the common source of both.
        target: where SE goes by default, if not on the branch before stochastic depth and layer scale.
    """

    kind: str
    call: Call
    region: int
    branch: Op
    join: Op
    skip: Op | None = None
    source: Op | None = None
    target: Target | None = None


@dataclass(eq=False)
class Place:
    """A place for SE: the value that ``op`` computes, as it appears in the code of the module that ``call`` called.

    Attributes:
        block, kind: path and kind of the block.
        users: the operations that get the recalibrated value; None means all later ones.
        layers: the paths of the modules and parameters in the block; they are equal for another call of the same block,
            which is the only case in which SE is shared.
        region: the operations of the block, as a bit set of their indices.
        named: whether the user named the place; it is not a block that was found.
        aside: if it is not empty, the reason why the block gets no SE unless ``include`` names it.
    """

    block: str
    kind: str
    call: Call
    op: Op
    users: frozenset[Op] | None = None
    layers: frozenset[str] = frozenset()
    region: int = 0
    named: bool = False
    aside: str = ""

    @property
    def channels(self) -> int:
        assert self.op.channels is not None
        return self.op.channels

    @property
    def overwritten(self) -> bool:
        """Whether the network itself overwrites the value next (``out += identity``), so that SE may do so, too."""
        user = only_user(self.op)
        return self.users is None and user is not None and user.inplace and user.inputs[:1] == (self.op,)


@dataclass(eq=False)
class Found:
    """What was found in a record: where SE goes, and which blocks are skipped and why.

    Attributes:
        places: the places where SE goes, including those where it goes only if ``include`` names the block.
        skipped: the reason for each skipped block.
        regions: the operations of blocks, placed or skipped, as bit sets of their indices.
        shortcuts: the operations by which units project their input, as a bit set.
        attended: number of blocks that already have channel attention.
    """

    places: list[Place] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)
    shortcuts: int = 0
    attended: int = 0

    def leave(self, block: str, reason: str, region: int = 0) -> None:
        """Skip a block, for this reason unless there already is one."""
        self.skipped.setdefault(block, reason)
        self.regions[block] = self.regions.get(block, 0) | region


def problem_of(op: Op) -> str | None:
    """Return the reason why SE can't recalibrate a value, or None if it can."""
    if op.channels is None:
        return f"it is not known which dim of the output of {op.path or op.name} holds the channels"
    if op.channels < 2:
        return f"the output of {op.path or op.name} has only one channel"
    if not op.dtype.is_floating_point:
        return f"the output of {op.path or op.name} is of dtype {op.dtype}; SE is for real floating-point values"
    return None
