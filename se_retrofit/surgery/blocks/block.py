"""The result of a recogniser: a convolutional block, described by what its graph does."""

from __future__ import annotations

from dataclasses import dataclass

from ..record.graph import Call, Op


@dataclass(frozen=True, eq=False)
class Target:
    """A value that SE could recalibrate: that of ``op``, as it appears in the code of the module that ``call`` called (None:
    of no module), for ``users`` (None: for all users)."""

    call: Call | None
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
