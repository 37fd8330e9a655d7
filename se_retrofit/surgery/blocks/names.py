"""The name of a block: the path of its module, or of what it consists of."""

from __future__ import annotations

from torch import nn

from ..record.graph import Call, Op, Record
from ..record.roles import is_sequential
from .block import Block
from .questions import prefix_of


def name_of(record: Record, block: Block) -> str:
    """Return the path of a block: that of the module that it is in, or of one around it that holds nothing else; in a
    graph with other blocks, it is derived from the paths of its convolutions. Convolutions of a plain chain that
    together form a unit of the network (the two of a U-Net's double convolution) are named after the unit."""
    outer = block.call
    beside = [op for op in record.select(outer.mask & ~block.region) if op.spatial_conv]
    chain, paths = block.kind == "chain", conv_paths(record, block)
    if not beside and (outer.path or not chain):
        return _around(record, outer).path
    if chain and is_unit(record, outer, beside):
        return outer.path
    prefix = prefix_of(paths)
    if prefix != outer.path and (of_list := _in_list(record, paths, beside)):
        return of_list
    if not (chain or is_sequential(outer.module) or outer.path == ""):
        return _around(record, outer).path
    shared = chain and any((path_of(op) or "").startswith(f"{prefix}.") for op in beside)
    return prefix if prefix != outer.path and not shared else (paths or [prefix])[0]


def conv_paths(record: Record, block: Block) -> list[str]:
    own = (op for op in record.select(block.region) if op.conv is not None and not op.flat)
    return [path for op in own if (path := path_of(op))]


def path_of(conv: Op) -> str | None:
    """Return the path of a convolution's module; for a function, of the one that has, or computes, its weight."""
    weights = (source.path for source in conv.inputs if source.role == "param" and source.path)
    return conv.path or next((path.rpartition(".")[0] or path for path in weights), conv.call.path) or None


def _in_list(record: Record, paths: list[str], beside: list[Op]) -> str | None:
    """Return the name of a block computed by a loop over a list: its own element of the list, if there are others."""
    prefix = prefix_of(paths)
    modules = dict(record.model.named_modules())
    for name, around in ((paths[0] if paths else "", prefix), (prefix, prefix.rpartition(".")[0])):
        others = any((path_of(op) or "").startswith(f"{around}.") for op in beside)
        if others and isinstance(modules.get(around), nn.ModuleList):
            return name
    return None


def _around(record: Record, call: Call) -> Call:
    """Return a sequence, or the outermost module around it that holds no other convolution."""
    while is_sequential(call.module) and call.parent is not None and call.parent.path:
        if any(op.conv is not None and not call.holds(op) for op in record.select(call.parent.mask)):
            break
        call = call.parent
    return call


def is_unit(record: Record, call: Call, beside: list[Op]) -> bool:
    """Return whether a module with several convolutions is a unit: it contains no other modules with convolutions,
    computes at one size, and if it is a sequence, the network has more like it. The features of a VGG are not a unit,
    because their size changes, nor is the only body of a network."""
    if any(op.call is not call for op in beside) or not _is_of_one_size(record, call):
        return False
    return not is_sequential(call.module) or any(
        is_sequential(other.module) and _is_of_one_size(record, other)
        for other in record.calls
        if not other.mask & call.mask and other.path != call.path
    )


def _is_of_one_size(record: Record, call: Call) -> bool:
    if not call.path:
        return False
    convs = [op for op in record.select(call.mask) if op.spatial_conv]
    sizes = {tuple(op.shape[-len(op.conv.kernel) :]) for op in convs if op.conv is not None}
    return len(convs) > 1 and len(sizes) == 1
