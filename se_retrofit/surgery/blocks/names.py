"""What a block is called: by the path of the module that it is, or of what it is made of."""

from __future__ import annotations

from ..record.graph import Call, Record
from ..record.roles import is_sequential
from .block import Block
from .questions import prefix_of

__all__ = ["name_of"]


def name_of(record: Record, block: Block) -> str:
    """The path of a block: that of the module in which it stands, or of one around it that holds nothing else; in a
    graph that holds more than the block, what the paths of its convolutions tell. Those convolutions of a plain chain that
    are a unit of the network together (the two of a U-Net's double convolution) are named after the unit."""
    outer = block.call
    beside = [op for op in record.select(outer.mask & ~block.region) if op.spatial_conv]
    parted = block.kind == "chain" and any(op.call is not outer for op in beside)  # a stem, say, beside stages
    if beside and (is_sequential(outer.module) or outer.path == "" or parted):
        if block.kind == "chain" and not parted and is_unit(record, outer):
            return outer.path
        paths = conv_paths(record, block)
        prefix = prefix_of(paths)
        return prefix if prefix != outer.path else (paths or [prefix])[0]
    return _around(record, outer).path


def conv_paths(record: Record, block: Block) -> list[str]:
    own = (op for op in record.select(block.region) if op.conv is not None and not op.pooled)
    return [op.path for op in own if op.path]


def _around(record: Record, call: Call) -> Call:
    """A sequence, or the outermost module around it that holds no convolution beside."""
    while is_sequential(call.module) and call.parent is not None and call.parent.path:
        if any(op.conv is not None and not call.holds(op) for op in record.select(call.parent.mask)):
            break
        call = call.parent
    return call


def is_unit(record: Record, call: Call) -> bool:
    """Whether a sequence with several convolutions is a unit of which the network has more: it and another one compute at one
    size each. The features of a VGG are none, since their size changes, nor is the one body of a network."""
    return _is_of_one_size(record, call) and any(
        _is_of_one_size(record, other)
        for other in record.calls
        if not other.mask & call.mask and other.path != call.path
    )


def _is_of_one_size(record: Record, call: Call) -> bool:
    if not is_sequential(call.module) or not call.path:
        return False
    ops = list(record.select(call.mask))
    convs = [op for op in ops if op.spatial_conv]
    sizes = {tuple(op.shape[-len(op.conv.kernel) :]) for op in convs if op.conv is not None}
    return len(convs) > 1 and len(sizes) == 1
