"""Plain chains."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import innermost, real_users
from ..record.graph import Op, Record
from .attended import adds_positions
from .block import Block, Target
from .questions import activation_after, is_pointwise, next_after

__all__ = ["plain_chains"]


def plain_chains(record: Record) -> Iterator[Block]:
    """Convolutions, norms and activations in a row: SE goes after each non-linearity (VGG, Simonyan and Zisserman,
    arXiv:1409.1556; with SE: Hu et al., section 6.2; a depthwise-separable pair, as in MobileNet, is one unit)."""
    units = list(_units(record))
    if len(units) < 2:
        return  # a lone stem
    for conv, act in units:
        call = innermost(record, [conv, act])
        if call is not None:
            region = (act.ancestors | act.bit) & ~conv.ancestors
            yield Block("chain", call, region, act, act, target=Target(call, act))


def _units(record: Record) -> Iterator[tuple[Op, Op]]:
    """Each conv with the non-linearity that closes its unit."""
    outputs = {op for call in record.calls if call.parent is None for op in call.outputs}
    for conv in record.ops:
        if not conv.spatial_conv:
            continue
        if _covers_its_input(conv):
            continue
        following = activation_after(conv)
        if conv.conv is not None and conv.conv.depthwise:
            pair = next_after(conv, ("norm", "pass", "affine", "pool"))
            if pair is not None and pair.role == "act":
                pair = next_after(pair, ("norm", "pass", "affine"))
            if pair is not None and is_pointwise(pair) and pair.conv is not None:
                closing = next_after(pair, ("norm", "pass", "affine", "pool"))
                if closing is not None and closing.role == "act":
                    following = closing
        if (
            following is not None
            and not adds_positions(conv, following)
            and (following not in outputs or real_users(following))
        ):
            yield conv, following


def _covers_its_input(conv: Op) -> bool:
    """Whether a conv's kernel covers its whole input: a fully-connected layer, written as a convolution."""
    before = conv.data[0].shape
    assert conv.conv is not None
    dims = len(conv.conv.kernel)
    return (
        not conv.conv.transposed
        and all(s == 1 for s in conv.shape[-dims:])
        and tuple(before[-dims:]) == conv.conv.kernel
    )
