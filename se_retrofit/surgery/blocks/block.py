"""What a recogniser yields: a convolutional block, told by what its graph does."""

from __future__ import annotations

from dataclasses import dataclass

from ..record.graph import Call, Op

__all__ = ["Block", "Target"]


@dataclass(frozen=True, eq=False)
class Target:
    """A value that SE could recalibrate: that of ``op``, as it appears in the code of the module that ``call`` called (None:
    of none), for ``users`` (None: for all that take it)."""

    call: Call | None
    op: Op
    users: frozenset[Op] | None = None


@dataclass(eq=False)
class Block:
    """One block.

    Attributes:
        kind: what it is, in a word for users: ``"residual"``.
        call: the call of the module in whose code it ends.
        region: the operations that it computes anew, as a bit set of their indices.
        branch: the last value that it computes anew.
        join: the operation in which that meets what bypassed the block; ``branch`` where nothing does.
        skip, source: of a residual unit: the value that is added to the branch, and the one from which both come.
        target: where SE goes by itself, if not on the branch before stochastic depth and layer scale.
    """

    kind: str
    call: Call
    region: int
    branch: Op
    join: Op
    skip: Op | None = None
    source: Op | None = None
    target: Target | None = None
