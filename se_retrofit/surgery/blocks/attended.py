"""The convolutions in a branch with attention, and their purpose."""

from __future__ import annotations

from ..record.facts import only_user, real_users
from ..record.graph import Op
from .questions import TRANSPARENT, next_after

_WEIGHTS = ("sigmoid", "softmax", "_softmax", "_safe_softmax", "softmax2d")


def spatial_convs(ops: list[Op]) -> list[Op]:
    """Return the spatial convolutions among the operations of a branch that compute features. Not so in attention:

    One that only computes keys or queries (one for keys *and* values may pool them: PVT, Wang et al.,
    arXiv:2102.12122). A depthwise one without an activation that is added to values or weights them, which encodes
    positions (CoaT, Xu et al., arXiv:2104.06399; CSWin, Dong et al., arXiv:2107.00652), unless it has a norm and the
    sum is activated (EfficientFormerV2, Li et al., arXiv:2212.08059). The only layer of a branch beside tokens (wav2vec
    2.0, Baevski et al., arXiv:2006.11477)."""
    convs = [op for op in ops if op.spatial_conv]
    if not convs:
        return []
    if any(op.role in ("linear", "other") and len(op.data) > 1 for op in ops):
        return [c for c in convs if not _is_position(c) and _makes_values(c, set(ops))]
    layers = [op for op in ops if op.conv is not None or op.role == "linear"]
    beside_tokens = ops[-1].dim == 3 and ops[-1].channel_dim == -1
    return [] if beside_tokens and len(layers) == 1 else convs


def adds_positions(conv: Op, act: Op) -> bool:
    """Return whether a lone convolution is only added to its input: it encodes positions, if it is no residual unit."""
    join, source = act, conv.data[0]
    while join.role != "add":
        user = only_user(join)
        if user is None or user.role not in ("act", "pass", "affine", "shape", "add"):
            return False
        join = user
    while source.role in ("pass", "shape") and len(source.data) == 1 and source not in join.data:
        (source,) = source.data
    return source in join.data


def _is_position(conv: Op) -> bool:
    normed, join = False, only_user(conv)
    while join is not None and join.role in ("norm", "pass", "shape", "affine", "part", "cat"):
        normed = normed or join.role == "norm"
        join = only_user(join)
    if not conv.depthwise or join is None or join.role not in ("add", "mul") or len(join.data) < 2:
        return False
    following = next_after(join, TRANSPARENT) if normed else None
    return following is None or following.role != "act"


def _makes_values(conv: Op, ops: set[Op]) -> bool:
    """Return whether a path from a convolution to the end of the branch does not enter attention as a weight, query or
    key: into a product as what a sigmoid or softmax made (BAT, Chi et al., arXiv:2006.03318), or as one of the first two
    of three values."""
    reached, waiting = {conv}, [conv]
    weights: set[Op] = set()
    for value in waiting:
        for user in real_users(value):
            if user not in ops:
                return True
            weighs = user.role == "linear" and len(user.data) == 2 and value in weights
            asks = user.role == "other" and len(user.data) == 3 and value is not user.data[2]
            if user in reached or weighs or asks:
                continue
            reached.add(user)
            waiting.append(user)
            if user.name.lower() in _WEIGHTS or weights.issuperset(user.data):
                weights.add(user)
    return False
