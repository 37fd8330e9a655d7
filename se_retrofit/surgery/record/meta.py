"""Operations on the meta device, whose outputs are determined by the shapes, strides and dtypes of their inputs.

torch decomposes many of them in Python, which takes most of a recording's time; so each is run once, and its result is
reused for inputs of the same form.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.layout, torch.device, torch.memory_format)


class MetaOperations:
    """Runs operations on meta tensors; cached results are valid for one planning."""

    def __init__(self) -> None:
        self.outputs: dict[Any, tuple[bool, tuple[Form, ...]]] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of an operation whose tensors are all on meta."""
        kind = _kind(func)
        if kind == "batch norm":
            return _batch_norm(args[0])
        if kind == "other":
            return func(*args, **kwargs)
        try:
            key = (func, torch.get_default_dtype(), *map(_key, args), *((k, _key(v)) for k, v in kwargs.items()))
        except _NoKey:
            return func(*args, **kwargs)
        known = self.outputs.get(key)
        if known is None:
            output = func(*args, **kwargs)
            several = type(output) is tuple
            tensors = output if several else (output,)
            if all(type(t) is Tensor and t.device.type == "meta" for t in tensors):
                self.outputs[key] = several, tuple((t.size(), t.stride(), t.dtype) for t in tensors)
            return output
        if kind == "in place":
            return args[0]
        several, forms = known
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in forms]
        return tuple(made) if several else made[0]


@functools.cache
def _kind(func: Any) -> str:
    """Return whether an operation's outputs are new tensors, or its first input changed elementwise, or uncertain."""
    schema = func._schema
    if schema.name in _BATCH_NORMS:
        return "batch norm"
    if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        return "other"
    if not schema.returns or any(str(r.type) != "Tensor" for r in schema.returns):
        return "other"
    aliased = [a for a in (*schema.arguments, *schema.returns) if a.alias_info is not None]
    if not aliased:
        return "new"
    written = aliased[0].alias_info.is_write and torch.Tag.pointwise in func.tags
    return "in place" if written and aliased == [schema.arguments[0], schema.returns[0]] else "other"


_BATCH_NORMS = (
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training",
)  # fmt: skip


def _batch_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # torch.empty_like on meta is a decomposition in Python, thirty times slower
    plain = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    output = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta") if plain else torch.empty_like(x)
    return output, torch.empty(x.shape[1], device="meta"), torch.empty(x.shape[1], device="meta")


class _NoKey(Exception):
    """An argument that can't be compared with others."""


def _key(value: Any) -> Any:
    cls = type(value)
    if cls in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.dtype.is_complex:
        return value.size(), value.stride(), value.dtype
    if cls in _PLAIN:
        return cls, value  # 1 == 1.0 == True
    if cls in (list, tuple):
        return cls, *map(_key, value)
    raise _NoKey
