"""Where SE goes in each block.

One principle: SE recalibrates what the block has newly computed, once, at the last value before it joins what bypassed
the block (Hu et al., sections 3.3 and 6.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .blocks import FoundBlock, gated_after, is_gate, is_pointwise, name_of, other_names
from .branches import chain_units, is_prediction, multi_branch, rep_sum
from .bypass import dense_layers, dual_path, residual_unit, split_unit
from .inverted import core_of, inverted_core, projects
from .operations import innermost, only_user
from .record import Call, Op, Record

__all__ = ["PLACEMENTS", "Place", "Placement", "find_places"]

PLACEMENTS = ("auto", "standard", "pre", "post", "identity", "3x3")

HAS_ATTENTION = "has channel attention already"


@dataclass(eq=False)
class Place:
    """A place for SE: on the value that ``op`` makes, as it appears in the code of the module that ``call`` called.

    ``users`` are the operations that get the recalibrated value; None means all that come after. ``names`` are paths beside the
    block's by which it may be asked for.
    """

    block: str
    kind: str
    call: Call
    op: Op
    users: frozenset[Op] | None = None
    names: tuple[str, ...] = ()

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
class Placement:
    """What was found in a record: where SE goes, and which blocks are skipped and why."""

    places: list[Place] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    attended: int = 0  # blocks that have channel attention already


class _Finder:
    def __init__(self, record: Record, placement: str) -> None:
        self.record = record
        self.placement = placement
        self.result = Placement()
        self.found = 0  # the bits of all blocks with a bypass and all inverted ones, whether they get SE or not
        self.sited = 0  # the bits of the values behind which SE goes, and of blocks that have attention
        self.covered = 0  # the bits of the blocks that get SE
        # blocks for which there is no place, with the reason and their bits; one around them may have one
        self.unplaced: dict[str, tuple[str, int]] = {}

    def run(self) -> Placement:
        self.blocks_with_bypass()
        self.inverted_without_bypass()
        self.joined_branches()
        if not self.result.places and not self.result.attended and not self.unplaced:
            self.chains()
        for name, (reason, region) in self.unplaced.items():
            if not region & self.covered:
                self.leave(name, reason)
        return self.result

    def blocks_with_bypass(self) -> None:
        record = self.record
        for call in reversed(record.calls):
            own = [op for op in record.ops[call.start : call.end] if op.call is call and op.role in ("add", "cat")]
            before = self.found
            for op in reversed(own):  # the last cat of a dense block is the one of all its layers
                for block in dense_layers(record, call, op):
                    if not block.region & self.sited:
                        self.place(block, self.dense_place(block) if self.placement == "auto" else None)
            for op in own:
                residual, dense = residual_unit(record, call, op), split_unit(record, call, op)
                if residual is not None and not residual.region & self.sited:
                    self.residual(residual)
                if dense is not None and not dense.region & self.sited:
                    self.place(dense, (call, self.branch_end(dense)) if self.placement == "auto" else None)
            if self.found == before and len(own) > 1:
                dual = dual_path(record, call, own)
                if dual is not None and not dual.region & self.sited:
                    self.place(dual, (dual.call, dual.branch) if self.placement == "auto" else None)

    def residual(self, block: FoundBlock) -> None:
        core = core_of(self.record, block)
        if core is not None:
            block.kind = "inverted"
        if core is not None and self.placement == "auto":
            self.place(block, self.edge(core.value, core.taker))
            return
        if self.placement in ("auto", "standard"):
            self.place(block, (block.call, self.branch_end(block)))
        elif self.placement == "post":
            following = only_user(block.join)
            acted = following is not None and following.role == "act" and block.call.shows(following)
            self.place(block, (block.call, following if acted and following is not None else block.join))
        elif self.placement == "identity":
            assert block.skip is not None
            self.place(block, (block.call, block.skip), frozenset([block.join]))
        elif self.placement == "pre":
            assert block.source is not None
            source = block.source
            if not source.bit & block.branch.ancestors:  # branch and skip are two inputs
                source = next((i for i in block.call.inputs if i.bit & block.branch.ancestors), source)
            self.place(block, (block.call, source), frozenset(u for u in source.users if u.bit & block.region))
        else:
            self.place(block, self.spatial_place(block))

    def branch_end(self, block: FoundBlock) -> Op:
        """The branch's last value before stochastic depth and layer scale."""
        return self.before(block.branch, block.call, ("pass", "affine"))

    @staticmethod
    def before(op: Op, call: Call | None, roles: tuple[str, ...]) -> Op:
        """Follow a value back through operations of these roles that stand in the module's own graph."""
        while op.role in roles and len(op.data) == 1 and only_user(op.data[0]) is op:
            if call is None or not call.shows(op.data[0]):
                break
            op = op.data[0]
        return op

    def spatial_place(self, block: FoundBlock) -> tuple[Call | None, Op]:
        """Inside the branch: after its spatial conv's norm and activation."""
        for conv in reversed([op for op in self.record.select(block.region) if op.spatial_conv]):
            op, acted = conv, False
            user = only_user(op)
            while (
                user is not None
                and user.bit & block.region
                and user.role in ("norm", "act", "pass", "affine", "cat", "shape")
            ):
                op, acted = user, acted or user.role == "act"
                user = only_user(op)
            if user is not None and (acted or is_pointwise(user)):
                return self.edge(op, user)
        return block.call, self.branch_end(block)

    def edge(self, value: Op, taker: Op) -> tuple[Call | None, Op]:
        """The module in whose own graph a value goes from one operation to another."""
        call = innermost(self.record, [value, taker])
        return call, self.before(value, call, ("pass",))

    def dense_place(self, block: FoundBlock) -> tuple[Call | None, Op]:
        """A dense layer that is a module of its own gets its SE itself."""
        if block.layered:
            child = block.call.child_with(block.branch)
            if child is not None and child.shows(block.branch):
                block.call = child
        return block.call, self.branch_end(block)

    def inverted_without_bypass(self) -> None:
        for conv in list(self.record.ops):
            if conv.bit & self.found:
                continue
            core = inverted_core(conv)
            if core is None:
                continue
            call = innermost(self.record, [conv, core.projection])
            if call is None or not projects(core.projection) or core.projection.bit & self.found:
                continue
            if is_prediction(self.record, core.projection):
                continue
            region = (core.projection.ancestors | core.projection.bit) & ~conv.ancestors
            block = FoundBlock("inverted", call, region, core.projection, core.projection)
            self.place(block, self.edge(core.value, core.taker) if self.placement == "auto" else None)

    def joined_branches(self) -> None:
        record = self.record
        taken = self.found
        masks: dict[int, int] = {}
        for call in record.calls:
            module = id(call.module)
            masks[module] = masks.get(module, 0) | call.mask
        for call in record.calls:
            if masks[id(call.module)] & ~call.mask & self.found:
                continue  # another call of the same module is part of a block
            own = [op for op in record.ops[call.start : call.end] if op.call is call]
            for op in reversed(own):
                if op.bit & taken:
                    continue
                block = self.joined(call, op) or rep_sum(record, call, op)
                if block is None or block.region & taken:
                    continue
                taken |= block.region
                where = self.outside_of_sum(block) if block.kind == "rep-sum" else (block.call, block.branch)
                self.place(block, where if self.placement == "auto" else None)

    def joined(self, call: Call, cat: Op) -> FoundBlock | None:
        """A multi-branch block; the conv that fuses its branches may stand further out than the cat."""
        block = multi_branch(self.record, call, cat)
        while block is None and call.parent is not None and call.outputs == [cat]:
            call = call.parent
            block = multi_branch(self.record, call, cat)
        return block

    def outside_of_sum(self, block: FoundBlock) -> tuple[Call | None, Op]:
        """Behind the sum of a re-parameterisable block and its norm. Where that is all that a module does, the module is
        one conv in disguise and may be replaced by that conv: SE goes outside of it."""
        call, op = block.call, block.branch
        user = only_user(op)
        while user is not None and call.holds(user) and user.role in ("norm", "pass", "affine") and len(user.data) == 1:
            op, user = user, only_user(user)
        while call.outputs == [op] and call.parent is not None:
            call = call.parent
        if call is not block.call:
            return call, op
        op, user = block.branch, only_user(block.branch)
        while user is not None and user.role == "affine" and user.name == "add":  # of a branch that is the number 0
            op, user = user, only_user(user)
        return call, op

    def chains(self) -> None:
        units = list(chain_units(self.record))
        if len(units) < 2:
            return  # a lone stem
        for conv, act in units:
            call = innermost(self.record, [conv, act])
            if call is None:
                continue
            region = (act.ancestors | act.bit) & ~conv.ancestors
            block = FoundBlock("chain", call, region, act, act)
            self.place(block, (call, act) if self.placement == "auto" else None)

    def place(
        self, block: FoundBlock, where: tuple[Call | None, Op] | None, users: frozenset[Op] | None = None
    ) -> None:
        """Note the place for a block, or why there is none."""
        self.found |= block.region | block.join.bit
        name = name_of(self.record, block)
        if any(is_gate(op) for op in self.record.select(block.region)) or (where is not None and gated_after(where[1])):
            self.sited |= block.region
            self.result.attended += 1
            self.leave(name, HAS_ATTENTION)
            return
        if where is None:
            self.leave(name, f"placement {self.placement!r} is for residual units, this block is of kind {block.kind}")
            return
        call, op = where
        if call is not None:
            call = _where_shown(call, op)
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
            names = other_names(self.record, block)
            self.result.places.append(Place(name, block.kind, call, op, users, names))
            return
        self.unplaced[name] = (problem, block.region)

    def leave(self, block: str, reason: str) -> None:
        self.result.skipped.setdefault(block, reason)


def _where_shown(call: Call, op: Op) -> Call | None:
    """The call in whose code a value appears: this one, or the one inside of it that makes the value."""
    inner: Call | None = call
    while inner is not None and not inner.shows(op):
        if not inner.holds(op):
            return call if op in call.inputs else None
        inner = inner.child_with(op)
    return inner


def find_places(record: Record, placement: str = "auto") -> Placement:
    """Find the convolutional blocks of a record (that ``operations.read`` has read) and where SE goes in each."""
    result = _Finder(record, placement).run()
    result.places.sort(key=lambda place: place.op.index)
    return result
