"""Operations that mean less than their names say: masks, thresholds, fused joins, stochastic depth by selection."""

from __future__ import annotations

import torch

from .graph import Op

LEARNED = ("conv", "linear", "norm")

Meaning = tuple[str, tuple[Op, ...]]  # the role of an operation, and its inputs as far as they count


def meaning(op: Op, role: str, learned: int) -> Meaning:
    """Return what an operation of this role does; ``learned`` holds the bits of the learned layers so far."""
    data = op.data
    if op.name in ("lerp", "addcmul", "addcdiv"):
        # x + t * (y - x), x + weight * y: joins, if no third value weights them
        return (role, data) if len(data) <= 2 else ("other", op.takes)
    if op.name in ("maximum", "minimum"):
        halves = len(data) == 2 and all(i.role == "part" for i in data) and data[0].inputs == data[1].inputs
        # of a value and a learned threshold (TLU, Singh and Krishnan, arXiv:1911.09737), or of the halves of one value
        # (max-feature-map, Wu et al., arXiv:1511.02683)
        return ("act", op.takes) if len(data) == 1 or halves else (role, op.takes)
    if op.name == "where" and len(op.inputs) > 1 and _is_given(op.inputs[0], learned):
        return _selected(op, role)
    if op.name == "masked_fill" and all(_is_given(mask, learned) for mask in op.inputs[1:]):
        return "affine", op.inputs[:1]
    if role == "mul" and len(data) == 2:
        for x, mask in (data, data[::-1]):
            given = _is_given(mask, learned) or _is_binary(mask)
            if given and not _is_given(x, learned) and _spans_channels(mask, x):
                return "affine", (x,)
    return role, op.takes


def interpolated(op: Op) -> tuple[Op, ...]:
    """Return the operations that make up ``x + t * (y - x)`` (as for a ``torch.lerp`` by a tensor on meta), starting
    with the difference; empty if an add is something else."""
    for x, step in (op.data, op.data[::-1]) if op.role == "add" and len(op.data) == 2 else ():
        path: list[Op] = []
        while step.role in ("affine", "pass") and len(step.data) == 1:
            path.append(step)
            (step,) = step.data
        if path and step.name == "sub" and len(step.data) == 2 and step.data[1] is x:
            return (step, *path)
    return ()


def _is_given(op: Op, learned: int) -> bool:
    """Return whether a value does not depend on a learned layer: lengths, padding, dropped frames."""
    return not op.lineage & learned


def _is_binary(op: Op) -> bool:
    """Return whether a value is the result of a comparison: no gradient passes that, whatever is compared."""
    while op.role in ("pass", "shape") and len(op.data) == 1:
        (op,) = op.data
    return op.dtype == torch.bool


def _spans_channels(mask: Op, x: Op) -> bool:
    """Return whether a factor is the same for all channels."""
    dim = x.channel_dim
    if dim is None:
        return mask.shape != x.shape
    return mask.dim < -dim or mask.shape[dim] == 1


def _selected(op: Op, role: str) -> Meaning:
    """Return the meaning of a selection between values that does not depend on a learned layer."""
    values = [i for i in op.inputs[1:] if i.role != "param"]
    if len(values) == 1:  # masked
        return "affine", (values[0],)
    for new, old in (values, values[::-1]) if len(values) == 2 else ():
        if new.role == "add" and old in new.data:  # x + f(x) or x: stochastic depth (Huang et al., arXiv:1603.09382)
            return "pass", (new,)
    return role, op.takes
