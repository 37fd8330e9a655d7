"""What each operation of a record does: its role, whether it is a convolution and of which kind, which dim of its
output holds the channels, and whether the output is a pooled value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .graph import Call, Conv, Op, Record
from .roles import module_role, role_of

LEARNED = ("conv", "linear", "norm")

Takers = dict[Op, list[Op]]
Meaning = tuple[str, tuple[Op, ...]]  # the role of an operation, and its inputs as far as they count


def read(record: Record) -> Record:
    """Determine the roles, users, channels and pooling of all operations of a record."""
    takers: dict[Op, list[Op]] = {}
    for op in record.ops:
        for source in op.inputs:
            takers.setdefault(source, []).append(op)
    learned = 0
    parameters = {path for path, _ in record.model.named_parameters(remove_duplicate=False)}
    for op in record.ops:
        _read(op, takers, learned)
        if op.module is None and op.depthwise and _is_fixed(record, op, parameters):
            op.role, op.conv = "pool", None  # a blur (Zhang, arXiv:1904.11486)
        learned |= op.bit if op.role in LEARNED else 0
    return record


def _read(op: Op, takers: Takers, learned: int) -> None:
    op.takes = op.inputs
    op.role, op.takes = meaning(op, _role(op), learned)
    written_out: tuple[Op, ...] = ()  # operations that are parts of this one
    if op.role == "mul" and len(op.inputs) == 2:
        for x, gate in (op.inputs, op.inputs[::-1]):
            if not written_out and (written_out := _gate_of_itself(x, gate, takers)):  # x * sigmoid(x), an activation
                op.role, op.takes = "act", (x,)
    if op.role == "pool" and (stack := _summed_stack(op, takers)) is not None:  # torch.stack([x, f(x)]).sum(0), an add
        op.role, op.takes, written_out = "add", stack.inputs, (stack,)
    if path := interpolated(op):
        op.takes, written_out = path[0].data[::-1], path
    if op.role == "conv":
        op.conv = _conv_of(op)
    for source in op.takes:
        source.users = [user for user in source.users if user not in written_out]
        op.ancestors |= source.lineage
        source.users.append(op)
    if path:
        op.takes[1].users[-1] = path[0]  # the code names the branch only in the difference
    op.channel_dim = _channel_dim(op)
    if op.conv is not None and op.data:
        _tell_channels(op.data[0], op)
    elif op.role == "add" and op.channel_dim is not None:
        for operand in op.data:
            if operand.shape == op.shape:
                operand.channel_dim = operand.channel_dim or op.channel_dim
    _follow_pooling(op)


def _role(op: Op) -> str:
    if op.name in ("input", "param"):
        return op.name
    if all(i.role == "param" for i in op.inputs):
        return "param"
    if op.module is not None:
        role = module_role(op.module) or "other"
    else:
        role = role_of(op.name)
    if role in ("add", "mul") and len(op.data) < 2:
        return "affine"
    if op.name == "slice" and op.inputs[0].shape == op.shape:
        return "pass"  # x[:, :3] has a slice for each dim in some versions of torch
    return role


def only_user(op: Op) -> Op | None:
    """Return the only operation that uses a value; None if there are several or none."""
    users = real_users(op)
    return users[0] if len(users) == 1 else None


def real_users(op: Op) -> list[Op]:
    return [u for u in op.users if u.role != "param"]


def behind(op: Op, roles: tuple[str, ...]) -> Op:
    """Follow a value back through operations of these roles that have one operand."""
    while op.role in roles and len(op.data) == 1:
        (op,) = op.data
    return op


def is_conv_or_linear(op: Op) -> bool:
    return op.conv is not None or op.role == "linear"


def innermost(first: Op, second: Op) -> Call:
    """Return the innermost call of a module in which both operations happen."""
    call = first.call
    while call.parent is not None and not call.holds(second):
        call = call.parent
    return call


def _conv_of(op: Op) -> Conv | None:
    if op.module is not None:
        m: Any = op.module
        return Conv(tuple(m.kernel_size), m.groups, m.in_channels, m.out_channels, m.transposed)
    if op.name == "deform_conv2d":
        # (input, weight, offset, mask, bias, stride, padding, dilation, two of each, groups, ...)
        transposed, groups = False, int(op.args[11])
    elif len(op.args) < 9 or len(op.inputs) < 2:
        return None
    else:  # (input, weight, bias, stride, padding, dilation, transposed, _, groups)
        transposed, groups = bool(op.args[6]), int(op.args[8])
    first, second, *kernel = op.inputs[1].shape
    inputs, outputs = (first, second * groups) if transposed else (second * groups, first)
    return Conv(tuple(kernel), groups, inputs, outputs, transposed)


def _is_fixed(record: Record, conv: Op, parameters: set[str]) -> bool:
    """Return whether the weight of a convolution depends neither on a parameter nor on an input."""
    weight = conv.inputs[1]
    return weight.role == "param" and not any(op.path in parameters for op in record.select(weight.lineage))


def _summed_stack(op: Op, takers: Takers) -> Op | None:
    """Return the stack of two values that is directly summed along its new dim."""
    if op.module is not None or op.name not in ("sum", "mean") or len(op.data) != 1 or op.data[0].name != "stack":
        return None
    stack, dims = op.data[0], op.args[1] if len(op.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    along = int(stack.args[1]) if len(stack.args) > 1 else 0
    if not dims or len(dims) != 1 or dims[0] % stack.dim != along % stack.dim or len(stack.inputs) != 2:
        return None
    return stack if takers[stack] == [op] else None


def _gate_of_itself(x: Op, gate: Op, takers: Takers) -> tuple[Op, ...]:
    """Return the operations from ``x`` to ``gate`` if that is an activation of ``x`` that only one product uses."""
    path: list[Op] = []
    while gate is not x:
        if gate.role not in ("act", "affine", "pass") or len(gate.data) != 1 or len(takers[gate]) != 1:
            return ()
        path.append(gate)
        (gate,) = gate.data
    return tuple(path) if any(op.role == "act" for op in path) else ()


# Operations that mean less than their names say: masks, thresholds, fused joins, stochastic depth by selection --------


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
            # no gradient passes a comparison, whatever is compared
            given = _is_given(mask, learned) or behind(mask, ("pass", "shape")).dtype == torch.bool
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


# Pooling --------------------------------------------------------------------------------------------------------------


def _spatial(op: Op) -> tuple[int, ...]:
    """Return the sizes of a value's dims except batch and channels; if the latter is unknown, all but the first two."""
    shape = list(op.shape)
    if op.channel_dim is not None and len(shape) >= -op.channel_dim:
        del shape[op.channel_dim]
        return tuple(shape[1:])
    return tuple(shape[2:])


def _channel_dim_of_several(source: Op, op: Op) -> int | None:
    """Return the channel dim of the mean of several maps (the views of an object, the frames of a video); None if
    something else is pooled."""
    dim = source.channel_dim
    if dim is None or op.dim != source.dim - 1 or op.dim <= -dim or source.shape[dim:] != op.shape[dim:]:
        return None
    return dim if len(source.shape[dim:]) > 1 else None


def _follow_pooling(op: Op) -> None:
    """Determine what is computed from a pooled value: the squeeze and the excitation of a channel gate."""
    data = op.data
    if not data or op.role in ("input", "param"):
        return
    if op.role == "pool" and op.module is None and _channel_dim_of_several(data[0], op) is not None:
        op.pooled = data[0].pooled
        return
    widest = max(data, key=_extent)
    if all(i.pooled for i in data):
        op.pooled = True
        op.flat = all(i.flat for i in data) or (op.role == "pool" and _extent(op) == 1)
        op.excited = any(i.excited for i in data) or op.role in ("conv", "linear", "act")
    elif op.role not in ("conv", "part", "cat", "add", "mul") and _extent(op) < _extent(widest):
        # at least one spatial dim is gone; or all of them, if the pool is written as a product (GlobalContext)
        if op.role == "pool":
            op.pooled = _loses_a_dim(widest, op)
        elif _extent(op) == 1 and op.role in ("linear", "other", "shape"):
            moved = op.channels is not None and op.channels == widest.channels  # (1, C, T) to (T, 1, C), say
            op.pooled = op.role != "shape" or (bool(_spatial(op)) and not moved)
        op.flat = op.pooled and _extent(op) == 1
    if op.role == "pool" and _is_global(op):
        op.pooled = op.flat = True


def _loses_a_dim(before: Op, after: Op) -> bool:
    """Return whether a pool removes a spatial dim. Size 1 doesn't count: maps (N, C, T, 1) are pooled over time."""
    was, left = _spatial(before), _spatial(after)
    return len(left) < len(was) or any(new == 1 < old for old, new in zip(was, left, strict=False))


def _extent(op: Op) -> int:
    return math.prod(map(int, _spatial(op)))


def _is_global(op: Op) -> bool:
    """Return whether a pool is global for every input size, which a record of a small input can't show."""
    if op.module is not None:
        size = getattr(op.module, "output_size", None)
        return size is not None and all(s == 1 for s in (size if isinstance(size, tuple) else (size,)))
    reduces = op.name in ("mean", "amax", "sum") or "adaptive" in op.name
    return reduces and all(s == 1 for s in _spatial(op)) and op.dim >= 2


# Channels -------------------------------------------------------------------------------------------------------------


def _tell_channels(op: Op, conv: Op) -> None:
    """Set the channel dim of a convolution's input, and of the values that it is computed from in place."""
    while op.channel_dim is None and op.dim == conv.dim:
        op.channel_dim = conv.channel_dim
        if op.role not in ("norm", "act", "pass", "affine") or len(op.data) != 1:
            break
        op = op.data[0]


def _folds_batch(conv: Op) -> bool:
    """Return whether a convolution has kernels for each image of the batch, which is folded into the channels
    (StyleGAN2), so that the number of channels depends on the batch."""
    given = conv.data[0] if conv.data else None
    if conv.module is not None or given is None:
        return False
    folded = given.role == "shape" and given.shape[0] == 1 and bool(given.data) and given.data[0].shape[0] > 1
    return folded or conv.inputs[1].role != "param"


def _channel_dim(op: Op) -> int | None:
    if op.conv is not None:
        return None if _folds_batch(op) else -len(op.conv.kernel) - 1
    data = op.data
    if not data:
        return None
    source = next((i for i in data if i.channel_dim is not None), data[0])
    if op.role == "linear":
        return -1 if isinstance(op.module, nn.Linear) or op.name in ("linear", "addmm", "mm") else None
    if source.channel_dim is None:
        return -1 if op.name in ("native_layer_norm", "layer_norm") else None
    before, after = source.dim, op.dim
    position = before + source.channel_dim
    if position < 0:
        return None
    if op.role == "shape":
        return _channel_dim_after(op, source, position)
    if before == after and (op.role != "other" or op.shape[position] == source.shape[position]):
        return source.channel_dim
    return _channel_dim_of_several(source, op) if op.role == "pool" and op.module is None else None


def _channel_dim_after(op: Op, source: Op, position: int) -> int | None:
    """Return the channel dim after a change of shape."""
    before, after = source.shape, op.dim
    if op.name == "permute":
        dims = op.args[1]
        return [d % after for d in dims].index(position) - after if len(dims) == after else None
    if op.name in ("transpose", "swapaxes", "t"):
        a, b = (0, 1) if op.name == "t" else (int(d) % after for d in op.args[1:3])
        return {a: b, b: a}.get(position, position) - after
    # the channels stay where they are if all dims up to them do; or if they are last and stay last
    if position < after and tuple(op.shape[: position + 1]) == tuple(before[: position + 1]):
        return position - after
    if position == len(before) - 1 and after and op.shape[-1] == before[-1]:
        return -1
    # or if only the batch was split or merged (frames, views, windows)
    trailing = len(before) - position
    if trailing > 1 and after > trailing and tuple(op.shape[-trailing:]) == tuple(before[position:]):
        return -trailing
    return None
