"""Plain chains."""

from __future__ import annotations

from collections.abc import Iterator

from ..record.facts import innermost, is_conv_or_linear, only_user, real_users
from ..record.graph import Op, Record
from .attended import adds_positions
from .block import Block, Target
from .questions import TRANSPARENT, activation_after, is_pointwise, next_after, resizes


def plain_chains(record: Record) -> Iterator[Block]:
    """Convolutions, norms and activations in a row: SE goes after each non-linearity (VGG, Simonyan and Zisserman,
    arXiv:1409.1556; with SE: Hu et al., section 6.2; a depthwise-separable pair, as in MobileNet, is one unit); or
    after a convolution that is pooled or joined before it is activated (DISK, Tyszkiewicz et al., arXiv:2006.13566)."""
    for conv, act in _units(record):
        yield _chain(conv, act)


def lone_convolutions(record: Record) -> Iterator[Block]:
    """Convolutions without a non-linearity, such as the last of an FPN's levels (Lin et al., arXiv:1612.03144): SE goes after the
    norm. A convolution that is added to or multiplied with something else is a part of that."""
    acted = {conv for conv, _ in _units(record)}
    for conv in record.ops:
        if not conv.spatial_conv or conv in acted or covers_its_input(conv):
            continue
        following = next_after(conv, TRANSPARENT)
        if conv.depthwise or resizes(conv) or (following is not None and following.role in ("add", "mul")):
            continue
        end, user = conv, only_user(conv)
        while user is not None and user.role == "norm":
            end, user = user, only_user(user)
        if is_feature(end):
            yield _chain(conv, end)


def _chain(conv: Op, end: Op) -> Block:
    call = innermost(conv, end)
    return Block("chain", call, end.lineage & ~conv.ancestors, end, end, target=Target(call, end))


def _units(record: Record) -> Iterator[tuple[Op, Op]]:
    """Yield each convolution with the non-linearity that ends its unit."""
    for conv in record.ops:
        if not conv.spatial_conv or covers_its_input(conv):
            continue
        following = activation_after(conv)
        if conv.depthwise:
            pair = next_after(conv, ("norm", "pass", "affine", "pool"))
            if pair is not None and pair.role == "act":
                pair = next_after(pair, ("norm", "pass", "affine"))
            if pair is not None and is_pointwise(pair) and pair.conv is not None:
                following = activation_after(pair) or following
        if following is None and _is_activated_later(conv):
            following = conv
        if following is not None and is_feature(following, pooled=True) and not adds_positions(conv, following):
            yield conv, following


_KEEPING = ("norm", "pass", "affine", "pad", "pool", "resize", "cat")


def _is_activated_later(conv: Op) -> bool:
    """Return whether the value of a convolution is always activated before another layer uses it: after a pool, a
    change of size or a concat, none of which changes its features. The norm comes with the activation: if it came with
    the convolution, SE before a concat would pass it gradients in another layout, and its own would not be equal."""
    user = only_user(conv)
    if user is not None and user.role == "norm":
        return False
    reached, waiting = {conv}, [conv]
    for value in waiting:
        users = real_users(value)
        if not users or not all(user.role in _KEEPING or user.role == "act" for user in users):
            return False
        for user in users:
            if user.role != "act" and user not in reached:
                reached.add(user)
                waiting.append(user)
    return True


def is_feature(op: Op, pooled: bool = False) -> bool:
    """Return whether a learned layer (or, with ``pooled``, a pool) uses a value, which then is not a prediction."""
    return any(learned for _, _, learned in _takers(op, pooled)) and not tells_where(op)


def tells_where(op: Op) -> bool:
    """Return whether another value is sampled by this one (boxes, offsets, flows), which makes it a prediction."""
    return any(user.name in _SAMPLING and not first for user, first, _ in _takers(op))


_SAMPLING = ("grid_sampler_2d", "grid_sampler_3d", "deform_conv2d", "roi_align", "roi_pool", "ps_roi_align")


def _takers(op: Op, pooled: bool = False) -> Iterator[tuple[Op, bool, bool]]:
    """Yield the operations that use a value, up to the first learned layers (or pools), with whether each takes it as
    its data (first argument), and whether it is such a layer."""
    reached, waiting = {op}, [op]
    for value in waiting:
        for user in real_users(value):
            first = user.data[0] is value
            learned = user.role == "linear" or (first and (_is_learned(user) or (pooled and user.role == "pool")))
            yield user, first, learned
            joined = user.role in ("add", "mul", "cat", "shape") or user.name == "write"
            if not learned and user not in reached and (first or joined):
                reached.add(user)
                waiting.append(user)


def _is_learned(op: Op) -> bool:
    """Return whether an operation is a learned layer. A 1x1 convolution from colours to colours (mean shift) is not."""
    if op.conv is not None and not op.conv.spatial and op.conv.inputs == op.conv.outputs <= 4:
        return False
    own = op.module is not None and next(op.module.parameters(), None) is not None
    weighs = own or any(source.role == "param" and _is_stored(source) for source in op.inputs)
    return is_conv_or_linear(op) or (op.role == "other" and weighs)


def _is_stored(source: Op) -> bool:
    """Return whether a value comes from a parameter or buffer, and not from the run (such as zeros for a mask)."""
    return source.path is not None or any(map(_is_stored, source.inputs))


def covers_its_input(conv: Op) -> bool:
    """Return whether a convolution's kernel covers its whole input, as in a fully-connected layer."""
    before = conv.data[0].shape
    assert conv.conv is not None
    dims = len(conv.conv.kernel)
    one = all(size == 1 for size in conv.shape[-dims:])
    return one and not conv.conv.transposed and tuple(before[-dims:]) == conv.conv.kernel
