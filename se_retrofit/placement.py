"""Where SE goes in each block.

One principle: SE recalibrates what the block has newly computed, once, at the last value before it joins what bypassed
the block (Hu et al., sections 3.3 and 6.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from .blocks import (
    FoundBlock,
    chain_units,
    core_of,
    dense_layers,
    dual_path,
    gated_after,
    inverted_core,
    is_gate,
    is_pointwise,
    is_prediction,
    multi_branch,
    name_of,
    only_user,
    projects,
    rep_sum,
    residual_unit,
    split_unit,
)
from .reading import Network, Op, Reading
from .rehearsal import Call

__all__ = ["PLACEMENTS", "Spot", "Survey", "survey"]

PLACEMENTS = ("auto", "standard", "pre", "post", "identity", "3x3")

HAS_ATTENTION = "has channel attention already"


@dataclass(eq=False)
class Spot:
    """A place for SE: behind ``node`` of the graph of ``reading``'s module.

    ``users`` are the nodes that get the recalibrated value; None means all.
    """

    block: str
    kind: str
    reading: Reading
    node: fx.Node
    op: Op
    users: frozenset[fx.Node] | None = None

    @property
    def channels(self) -> int:
        assert self.op.channels is not None
        return self.op.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.op.value.dtype

    @property
    def overwritten(self) -> bool:
        """Whether the network itself overwrites the value next (``out += identity``): then SE may do so, too."""
        users = list(self.node.users)
        if self.users is not None or len(users) != 1 or users[0].args[:1] != (self.node,):
            return False
        user = users[0]
        if user.op == "call_module":
            return getattr(self.reading.call.module.get_submodule(str(user.target)), "inplace", False) is True
        if user.op == "call_method":
            return str(user.target).endswith("_") and not str(user.target).endswith("__")
        name = getattr(user.target, "__name__", "")
        return name in ("iadd", "isub", "imul", "itruediv") or user.kwargs.get("inplace") is True or name.endswith("_")


@dataclass(eq=False)
class Survey:
    """What was found in a network: where SE goes, and which blocks are left out and why."""

    spots: list[Spot] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    attended: int = 0  # blocks that have channel attention already


class _Surveyor:
    def __init__(self, network: Network, placement: str) -> None:
        self.network = network
        self.placement = placement
        self.survey = Survey()
        self.found = 0  # the bits of all blocks with a bypass and all inverted ones, whether they get SE or not
        self.sited = 0  # the bits of the values behind which SE goes, and of blocks that have attention
        self.covered = 0  # the bits of the blocks that get SE
        # blocks for which there is no place, with the reason and their bits; one around them may have one
        self.unplaced: dict[str, tuple[str, int]] = {}

    def run(self) -> Survey:
        self.blocks_with_bypass()
        self.inverted_without_bypass()
        self.joined_branches()
        if not self.survey.spots and not self.survey.attended and not self.unplaced:
            self.chains()
        for name, (reason, region) in self.unplaced.items():
            if not region & self.covered:
                self.leave(name, reason)
        return self.survey

    def blocks_with_bypass(self) -> None:
        network = self.network
        for reading in reversed(network.readings):
            own = [
                op
                for op in network.ops[reading.start : reading.end]
                if op.call is reading.call and op.role in ("add", "cat")
            ]
            before = self.found
            for op in reversed(own):  # the last cat of a dense block is the one of all its layers
                for block in dense_layers(network, reading, op):
                    if not block.region & self.sited:
                        self.place(block, self.dense_place(block) if self.placement == "auto" else None)
            for op in own:
                residual, dense = residual_unit(network, reading, op), split_unit(network, reading, op)
                if residual is not None and not residual.region & self.sited:
                    self.residual(residual)
                if dense is not None and not dense.region & self.sited:
                    self.place(dense, (reading, self.branch_end(dense)) if self.placement == "auto" else None)
            if self.found == before and len(own) > 1:
                dual = dual_path(network, reading, own)
                if dual is not None and not dual.region & self.sited:
                    self.place(dual, (dual.reading, dual.branch) if self.placement == "auto" else None)

    def residual(self, block: FoundBlock) -> None:
        core = core_of(self.network, block)
        if core is not None:
            block.kind = "inverted"
        if core is not None and self.placement == "auto":
            self.place(block, self.edge(core.value, core.taker))
            return
        if self.placement in ("auto", "standard"):
            self.place(block, (block.reading, self.branch_end(block)))
        elif self.placement == "post":
            following = only_user(block.join)
            acted = following is not None and following.role == "act" and block.reading.node_of(following) is not None
            self.place(block, (block.reading, following if acted and following is not None else block.join))
        elif self.placement == "identity":
            assert block.skip is not None
            self.place(block, (block.reading, block.skip), {block.join.node})
        elif self.placement == "pre":
            assert block.source is not None
            source = block.source
            if not source.bit & block.branch.ancestors:  # branch and skip are two inputs
                source = next((i for i in block.reading.inputs if i.bit & block.branch.ancestors), source)
            around = {block.reading.node_around(op) for op in self.network.select(block.region)}
            skip_side = self.network.select(
                0
                if block.skip is None
                else (block.skip.ancestors | block.skip.bit) & block.reading.mask & ~block.region
            )
            self.place(block, (block.reading, source), around - {block.reading.node_around(op) for op in skip_side})
        else:
            self.place(block, self.spatial_place(block))

    def branch_end(self, block: FoundBlock) -> Op:
        """The branch's last value before stochastic depth and layer scale."""
        return self.before(block.branch, block.reading, ("pass", "affine"))

    @staticmethod
    def before(op: Op, reading: Reading | None, roles: tuple[str, ...]) -> Op:
        """Follow a value back through operations of these roles that stand in the module's own graph."""
        while op.role in roles and len(op.data) == 1 and only_user(op.data[0]) is op:
            if reading is None or reading.node_of(op.data[0]) is None:
                break
            op = op.data[0]
        return op

    def spatial_place(self, block: FoundBlock) -> tuple[Reading | None, Op]:
        """Inside the branch: after its spatial conv's norm and activation."""
        for conv in reversed([op for op in self.network.select(block.region) if op.spatial_conv]):
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
        return block.reading, self.branch_end(block)

    def edge(self, value: Op, taker: Op) -> tuple[Reading | None, Op]:
        """The module in whose own graph a value goes from one operation to another."""
        reading = self.network.innermost([value, taker])
        return reading, self.before(value, reading, ("pass",))

    def dense_place(self, block: FoundBlock) -> tuple[Reading | None, Op]:
        """A dense layer that is a module of its own gets its SE itself."""
        node = block.reading.node_of(block.branch)
        if block.layered and node in block.reading.children:
            child = block.reading.children[node]
            if child.node_of(block.branch) is not None:
                block.reading = child
        return block.reading, self.branch_end(block)

    def inverted_without_bypass(self) -> None:
        for conv in list(self.network.ops):
            if conv.bit & self.found:
                continue
            core = inverted_core(conv)
            if core is None:
                continue
            reading = self.network.innermost([conv, core.projection])
            if reading is None or not projects(core.projection) or core.projection.bit & self.found:
                continue
            if is_prediction(self.network, core.projection):
                continue
            region = (core.projection.ancestors | core.projection.bit) & ~conv.ancestors
            block = FoundBlock("inverted", reading, region, core.projection, core.projection)
            self.place(block, self.edge(core.value, core.taker) if self.placement == "auto" else None)

    def joined_branches(self) -> None:
        network = self.network
        taken = self.found
        masks: dict[int, int] = {}
        for reading in network.readings:
            module = id(reading.call.module)
            masks[module] = masks.get(module, 0) | reading.mask
        for reading in network.readings:
            if masks[id(reading.call.module)] & ~reading.mask & self.found:
                continue  # another call of the same module is part of a block
            own = [op for op in network.ops[reading.start : reading.end] if op.call is reading.call]
            for op in reversed(own):
                if op.bit & taken:
                    continue
                block = self.joined(reading, op) or rep_sum(network, reading, op)
                if block is None or block.region & taken:
                    continue
                taken |= block.region
                where = self.outside_of_sum(block) if block.kind == "rep-sum" else (block.reading, block.branch)
                self.place(block, where if self.placement == "auto" else None)

    def joined(self, reading: Reading, cat: Op) -> FoundBlock | None:
        """A multi-branch block; the conv that fuses its branches may stand further out than the cat."""
        block = multi_branch(self.network, reading, cat)
        while block is None and reading.parent is not None and reading.outputs == [cat]:
            reading = reading.parent
            block = multi_branch(self.network, reading, cat)
        return block

    def outside_of_sum(self, block: FoundBlock) -> tuple[Reading | None, Op]:
        """Behind the sum of a re-parameterisable block and its norm. Where that is all that a module does, the module is
        one conv in disguise and may be replaced by that conv: SE goes outside of it."""
        reading, op = block.reading, block.branch
        user = only_user(op)
        while (
            user is not None and reading.holds(user) and user.role in ("norm", "pass", "affine") and len(user.data) == 1
        ):
            op, user = user, only_user(user)
        while reading.outputs == [op] and reading.parent is not None:
            reading = reading.parent
        return reading, op if reading is not block.reading else block.branch

    def chains(self) -> None:
        for conv, act in chain_units(self.network):
            reading = self.network.innermost([conv, act])
            if reading is None:
                continue
            region = (act.ancestors | act.bit) & ~conv.ancestors
            block = FoundBlock("chain", reading, region, act, act)
            self.place(block, (reading, act) if self.placement == "auto" else None)

    def place(
        self, block: FoundBlock, where: tuple[Reading | None, Op] | None, users: set[fx.Node | None] | None = None
    ) -> None:
        """Record a spot for a block, or why there is none."""
        self.found |= block.region | block.join.bit
        name = name_of(self.network, block)
        if any(is_gate(op) for op in self.network.select(block.region)) or (
            where is not None and gated_after(where[1])
        ):
            self.sited |= block.region
            self.survey.attended += 1
            self.leave(name, HAS_ATTENTION)
            return
        if where is None:
            self.leave(name, f"placement {self.placement!r} is for residual units, this block is of kind {block.kind}")
            return
        reading, op = where
        node = None
        if reading is not None:
            reading, node = self.locate(reading, op)
        problem = None
        if reading is None or node is None:
            problem = "the value that SE should recalibrate does not appear in the graph of any of its modules"
        elif op.channels is None:
            problem = f"which dim of {node.name} holds the channels can't be told"
        elif op.channels < 2:
            problem = f"{node.name} has one channel only"
        elif reading.block.flaws and reading.block.output is not node:
            # its forward can't be run as a graph, so SE can't stand in the middle of it
            problem = reading.block.flaws[0]
        if problem is not None or reading is None or node is None:
            self.unplaced[name] = (problem or "", block.region)
            return
        self.sited |= op.bit
        self.covered |= block.region
        chosen = None if users is None else frozenset(u for u in users if u is not None)
        self.survey.spots.append(Spot(name, block.kind, reading, node, op, chosen))

    def locate(self, reading: Reading, op: Op) -> tuple[Reading, fx.Node | None]:
        """The node that is a value: in this module's own graph, or in that of the module inside in which it appears."""
        node = reading.node_of(op)
        if node is None:
            node = next((n for n, structure in reading.ops.items() if structure is op), None)
        if node is None and reading.holds(op):
            inner = next((child for child in reading.children.values() if child.holds(op)), None)
            if inner is not None:
                return self.locate(inner, op)
        return reading, node

    def leave(self, block: str, reason: str) -> None:
        self.survey.skipped.setdefault(block, reason)


def survey(network: Network, placement: str = "auto") -> Survey:
    """Find the convolutional blocks of a network and where SE goes in each."""
    result = _Surveyor(network, placement).run()
    result.spots.sort(key=lambda spot: spot.op.index)
    known = [spot.block for spot in result.spots] + list(result.skipped)
    for call, reason in network.failures.items():
        # the model as a whole need not be traced; what it calls was read on its own
        if call.path and any(not _within(conv.path, known) for conv in call.walk() if _is_spatial_conv(conv)):
            result.skipped.setdefault(call.path, reason)
    return result


def _within(path: str, blocks: list[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def _is_spatial_conv(call: Call) -> bool:
    module = call.module
    return isinstance(module, torch.nn.modules.conv._ConvNd) and max(module.kernel_size) > 1
