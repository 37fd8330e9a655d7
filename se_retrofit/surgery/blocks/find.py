"""The places where SE goes: in the blocks that the recognisers yield, or where a user names them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from itertools import groupby

from torch import nn

from ...errors import RetrofitError
from ..record.graph import Call, Op, Record
from .block import Block, Found, Place, Target, problem_of
from .names import conv_paths, name_of, path_of
from .placements import PLACEMENTS, apart_from_concat
from .questions import gate_after, is_gate
from .table import RECOGNISERS, Recogniser

HAS_ATTENTION = "has channel attention already"
NOT_SHOWN = "the value that SE should recalibrate does not appear in the code of any of its modules"
# Blocks with less than this fraction of the spatial convolutions in chains are exceptions in a plain network.
FEW = 0.1


def find_places(record: Record, placement: str = "auto", recognisers: Sequence[Recogniser] = RECOGNISERS) -> Found:
    """Find the convolutional blocks of a record (that ``facts.read`` has read) and where SE goes in each."""
    finder = _Finder(record, placement)
    for nests, rows in groupby(recognisers, lambda row: row.nests):
        if nests:
            blocks = [block for row in rows for block in row.find(record)]
            finder.add_all(sorted(blocks, key=lambda block: -block.call.start), nests=True)
            continue
        for row in rows:
            free = [block for block in row.find(record) if finder.is_free(block)]
            alone = row.alone and finder.few_beside(free)
            finder.add_all(free, nests=False, aside="" if alone else row.aside)
    return finder.result()


class _Finder:
    def __init__(self, record: Record, placement: str) -> None:
        self.record = record
        self.placement = placement
        self.found = Found()
        self.taken = 0  # the bits of all blocks, whether or not they get SE
        self.sited = 0  # the bits of the values after which SE goes, and of blocks with attention
        self.covered = 0  # the bits of the blocks that get SE
        # blocks without a place, with the reason and their bits; a block around them may have a place
        self.unplaced: dict[str, tuple[str, int]] = {}
        self.calls: dict[str, int] = {}  # by the path of a convolution, the bits of all its calls
        for op in record.ops:
            if op.conv is not None and (path := path_of(op)):
                self.calls[path] = self.calls.get(path, 0) | op.bit

    def few_beside(self, blocks: list[Block]) -> bool:
        """Return whether the blocks found so far have hardly any spatial convolutions compared with these. A lone stem
        does not count."""
        there = sum(op.spatial_conv for op in self.record.select(self.taken))
        beside = sum(op.spatial_conv for block in blocks for op in self.record.select(block.region))
        return len(blocks) > 1 and there < FEW * beside

    def result(self) -> Found:
        for name, (reason, region) in self.unplaced.items():
            if not region & self.covered:
                self.found.leave(name, reason, region)
        return self.found

    def add_all(self, blocks: Iterable[Block], nests: bool, aside: str = "") -> None:
        for block in blocks:
            if not block.region & (self.sited if nests else self.taken):
                self.add(block, aside)

    def is_free(self, block: Block) -> bool:
        """Return whether no part of a block belongs to an earlier one, nor its convolutions to one in another call."""
        calls = [self.calls[path] for path in conv_paths(self.record, block)]
        return not any(bits & (self.taken | self.found.shortcuts) for bits in (block.region, *calls))

    def add(self, block: Block, aside: str) -> None:
        """Note the place for a block, or the reason why there is none."""
        self.taken |= block.region | block.join.bit
        if block.skip is not None and block.source is not None:
            self.found.shortcuts |= block.call.region(block.skip, block.source.lineage)
        name = name_of(self.record, block)
        target = PLACEMENTS[self.placement](self.record, block)
        if _has_attention(self.record, block):
            self.sited |= block.region
            self.found.attended += not aside
            self.found.leave(name, HAS_ATTENTION, block.region)
        elif target is None:
            of_kind = "has several branches" if block.kind == "residual" else f"is of kind {block.kind}"
            reason = f"placement {self.placement!r} is for residual units, this block {of_kind}"
            self.found.leave(name, reason, block.region)
        else:
            self.place(block, name, apart_from_concat(target), aside)

    def place(self, block: Block, name: str, target: Target, aside: str) -> None:
        op = target.op
        call = _where_shown(target.call, op)
        problem = NOT_SHOWN if call is None else problem_of(op)
        if call is None or problem is not None:
            self.unplaced[name] = (str(problem), block.region)
            return
        self.sited |= op.bit
        self.covered |= block.region
        place = Place(name, block.kind, call, op, target.users, self.layers(block), block.region, aside=aside)
        self.found.places.append(place)
        self.found.regions[name] = self.found.regions.get(name, 0) | block.region

    def layers(self, block: Block) -> frozenset[str]:
        own = list(self.record.select(block.region))
        layers = [op for op in own if op.conv is not None or op.role in ("linear", "norm")]
        layers += [source for op in own for source in op.inputs if source.role == "param"]
        return frozenset(layer.path for layer in layers if layer.path is not None)


def _has_attention(record: Record, block: Block) -> bool:
    """Return whether a channel gate is in a block, or follows its branch or (in the same module) its join."""
    if any(map(is_gate, record.select(block.region))) or gate_after(block.branch) is not None:
        return True
    gate = gate_after(block.join)
    return gate is not None and block.call.parent is not None and block.call.holds(gate)


def _where_shown(call: Call, op: Op) -> Call | None:
    """Return the call in whose code a value appears: this one, or the one inside it that computes the value."""
    inner: Call | None = call
    while inner is not None and not inner.shows(op):
        if not inner.holds(op):
            return call if op in call.inputs else None
        inner = inner.child_with(op)
    return inner


# Places that a user names ---------------------------------------------------------------------------------------------


def places_at(record: Record, patterns: Sequence[str]) -> Found:
    """Return the places at the outputs of the modules whose paths match one of the patterns."""
    found, called, wanted = Found(), _returned(record), set()
    first = {id(module): path for path, module in reversed(list(record.model.named_modules()))}
    modules = {  # a module may be named by any of its paths
        path: first[id(module)]
        for path, module in record.model.named_modules(remove_duplicate=False)
        if not isinstance(module, _CONTAINERS)
    }
    for pattern in patterns:
        matched = {modules[path] for path in fnmatch.filter(modules, pattern)}
        reasons = {path: _why_not(record, path) for path in matched - called.keys()}
        if matched <= reasons.keys():
            what = f"the pattern {pattern!r} matches none of the {len(modules)} modules"
            for path, reason in list(reasons.items())[:1]:
                what = f"the pattern {pattern!r} matches {path!r}, but {reason}"
            raise RetrofitError(f"{what}; called are {', '.join(list(called)[1:5])}, ...: see record(model).graph")
        found.skipped.update(reasons)
        wanted |= matched & called.keys()
    taken: set[Op] = set()
    for path in [path for path in called if path in wanted]:
        for call, op in called[path]:
            problem = "it does not return one tensor" if op is None else problem_of(op)
            if problem is not None or op is None:
                found.skipped[path] = str(problem)
            elif op not in taken:  # the output of an outer module may come from an inner one
                taken.add(op)
                layers, region = frozenset([path]), op.bit if op.path == path else call.mask
                found.places.append(Place(path, "named", call, op, layers=layers, region=region, named=True))
    return found


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _why_not(record: Record, path: str) -> str:
    if any(path == passed for call in record.calls for _, _, passed in call.passes):
        return "it returns its input as it is: name the module before it"
    return "it is not called on these inputs"


def _returned(record: Record) -> dict[str, list[tuple[Call, Op | None]]]:
    """Return for each module that was called the output of each call, and the call in whose code the output appears."""
    found: dict[str, list[tuple[Call, Op | None]]] = {}
    for call in record.calls:
        found.setdefault(call.path, []).append((call, call.returned))
    for op in record.ops:
        if op.module is not None and op.path is not None:
            found.setdefault(op.path, []).append((op.call, op))
    return found
