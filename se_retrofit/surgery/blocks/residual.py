"""Residual units."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from ..record.facts import LEARNED, behind, is_conv_or_linear
from ..record.graph import Call, Op, Record
from .attended import spatial_convs
from .block import Block
from .bypasses import all_pass
from .chains import tells_where
from .inverted import inverted_target
from .questions import (
    bypass_source,
    common_source,
    derives,
    escapes,
    feeds_a_layer,
    has_nonlinearity,
    has_spatial_conv,
    own_operations,
    resizes,
    summands,
)
from .rep_sum import summed_branches


def residual_units(record: Record) -> Iterator[Block]:
    """An add of a branch and a skip (the block's input, or a projection of it) that every path to the output passes (He
    et al., arXiv:1512.03385; with SE: Hu et al., arXiv:1709.01507, section 3.3). If the branch is the core of an
    inverted bottleneck, the block is of that kind (Sandler et al., arXiv:1801.04381)."""
    for call in reversed(record.calls):
        for add in own_operations(record, call):
            block = _unit(record, call, add)
            if block is not None:
                block.target = inverted_target(record, block)
                block.kind = "residual" if block.target is None else "inverted"
                yield block


def parallel_branches(record: Record) -> Iterator[Block]:
    """Residual units with several branches that are added one after another, ``x + f(x) + g(x)``: each branch gets SE
    (PolyNet, Zhang et al., arXiv:1611.05725)."""
    for call in reversed(record.calls):
        for add in own_operations(record, call) if call.parent is not None else ():
            values = summands(call, add)
            for skip, first in values:
                if first is not add:  # else the branches are summed up before, and are one
                    yield from _branches(record, call, skip, values)


def _branches(record: Record, call: Call, skip: Op, values: list[tuple[Op, Op]]) -> Iterator[Block]:
    """Yield the branches of a unit whose shortcut is its unchanged input."""
    others = [(value, add) for value, add in values if value is not skip]
    if not all(skip.bit & value.ancestors for value, _ in others):
        return
    if escapes(record, call, [skip], {add for _, add in values}):
        return
    outside = skip.lineage
    for branch, add in sorted(others, key=lambda other: other[0].index):
        region = call.region(branch, outside)
        ops = list(record.select(region))
        outside |= branch.lineage  # another branch may be computed from this one
        if spatial_convs(ops) and has_nonlinearity(ops) and not _spans_network(record, add, skip, ops):
            yield Block("residual", call, region, branch, add)


def reversible_units(record: Record) -> Iterator[Block]:
    """Two coupled residual units: ``y1 = x1 + f(x2); y2 = x2 + g(y1)`` (RevNet, Gomez et al., arXiv:1707.04585). What
    bypasses the first unit is not the input of its branch."""
    for call in reversed(record.calls):
        adds = [op for op in own_operations(record, call) if op.role == "add" and len(op.data) == len(op.takes) == 2]
        for first, second in combinations(adds, 2):
            yield from _coupled(record, call, first, second)


def _coupled(record: Record, call: Call, first: Op, second: Op) -> Iterator[Block]:
    for f, x1 in (first.data, first.data[::-1]):
        for g, x2 in (second.data, second.data[::-1]):
            if bypass_source(x1, call, 0, projections=0) is None or not first.bit & g.ancestors:
                continue
            from_x1, from_x2 = (derives(record, call, f, x) for x in (x1, x2))
            if from_x2 and not from_x1 and not derives(record, call, x1, x2):
                units = [
                    Block("residual", call, call.region(branch, source.lineage), branch, add, skip, source)
                    for branch, add, skip, source in ((f, first, x1, x2), (g, second, x2, first))
                ]
                if all(has_nonlinearity(record.select(unit.region)) for unit in units):  # else two levels of a pyramid
                    yield from (unit for unit in units if spatial_convs(list(record.select(unit.region))))


def _unit(record: Record, call: Call, add: Op) -> Block | None:
    if add.role != "add" or len(add.data) != 2 or len(add.takes) != 2:
        return None
    if add.data[0].shape != add.data[1].shape:
        return None  # an embedding, say, that is the same at all positions
    if _is_modulation(record, call, add):
        return None
    pairs = (add.data, add.data[::-1])
    for branch, skip in sorted(pairs, key=lambda pair: not pair[1].bit & pair[0].ancestors):  # an identity skip first
        source = bypass_source(skip, call, branch.ancestors)
        if source is None or any(value is source for value, _ in summands(call, branch)):
            continue
        common = bool(source.bit & branch.ancestors)
        region = call.region(branch, source.lineage)
        ops = list(record.select(region))
        if not spatial_convs(ops) or _is_of_another_stream(record, call, source, branch):
            continue
        moved_at_most = sorted(skip.shape) == sorted(source.shape)
        if not has_nonlinearity(ops) and not (moved_at_most and _is_plain_convolution(record, call, add, ops)):
            continue
        if not all_pass(record, call, [source] if common else call.inputs, add, region):
            continue
        if _is_query(source, region) or _spans_network(record, add, skip, ops) or tells_where(add):
            continue
        shortcut = record.select(skip.lineage & ~source.lineage)
        if call.parent is None and any(map(resizes, ops)) and not any(map(resizes, shortcut)):
            continue  # the resolution goes down and up again: a skip between the levels of an hourglass
        return Block("residual", call, region, branch, add, skip, source)
    return None


def _is_of_another_stream(record: Record, call: Call, source: Op, branch: Op) -> bool:
    """Return whether an input that a module adds to a branch comes from another stream (the waveform's, added to the
    spectrogram's: Défossez, arXiv:2111.03600): it involves convolutions and non-linearities that the branch doesn't."""
    own = list(record.select(source.lineage & ~branch.ancestors)) if source in call.inputs else []
    return has_spatial_conv(own) and has_nonlinearity(own)


def _is_modulation(record: Record, call: Call, add: Op) -> bool:
    """Return whether an add shifts what a map of the same origin scaled: ``norm(x) * (1 + gamma) + beta`` (SPADE, Park
    et al., arXiv:1903.07291; AdaIN, Huang and Belongie, arXiv:1703.06868; FiLM, Perez et al., arXiv:1709.07871)."""
    for product, shift in (add.data, add.data[::-1]):
        product = behind(product, ("pass", "affine"))
        if product.role != "mul" or len(product.data) != 2:
            continue
        for scaled, factor in (product.data, product.data[::-1]):
            origin = common_source(record, call, [factor, shift])
            given = [i for i in call.inputs if i.bit & factor.lineage & shift.lineage]
            origins = given if origin is None else [origin]
            if shift not in origins and origins and not any(derives(record, call, scaled, o) for o in origins):
                return True
    return False


def _spans_network(record: Record, add: Op, skip: Op, ops: list[Op]) -> bool:
    """Return whether a skip spans the whole network, as in restoration (VDSR, Kim et al., arXiv:1511.04587; DnCNN,
    Zhang et al., arXiv:1608.03981), so that its branch is not a unit but a network, which holds most of the
    convolutions; or whether its sum is the network's prediction, narrower than its first features: an image that is
    computed from the input image, or the logits of a last unit that ends in a bare convolution."""
    layers = {op.path for op in ops if op.spatial_conv}
    if len(layers) > 3 and 2 * len(layers) > len({op.path for op in record.ops if op.spatial_conv}):
        return True
    normed = not is_conv_or_linear(behind(ops[-1], ("pass", "affine", "shape")))
    if normed and any(op.role in LEARNED for op in record.select(skip.lineage)):
        return False
    first = next(op for op in record.ops if op.spatial_conv)
    return (first.channels or 0) > (add.channels or 0) > 0 and not feeds_a_layer(record, add)


def _is_query(source: Op, region: int) -> bool:
    """Return whether a value is a query of attention: it is added to the attention's output, and bypasses no block."""
    users = [source]
    for op in users:
        users += [u for u in op.users if u.bit & region and u.role in ("affine", "pass", "shape")]
    takers = [u for op in users for u in op.users if u.bit & region and u.name != "write"]
    return any(u.role in ("other", "linear") and len(u.data) > 1 for u in takers)


def _is_plain_convolution(record: Record, call: Call, add: Op, ops: list[Op]) -> bool:
    """Return whether a linear branch is a residual branch nevertheless: a convolution beside the input itself. Several
    linear branches are a sum to be fused (see rep_sum); a lone depthwise convolution encodes positions."""
    mixing = any(op.spatial_conv and not op.depthwise for op in ops)
    return mixing and not any(map(resizes, ops)) and summed_branches(record, call, add) is None
