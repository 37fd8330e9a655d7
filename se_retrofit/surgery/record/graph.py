"""A record of one run of a model: a ``torch.fx.Graph`` of every operation, and what is known of each of its nodes.

It is created by ``recorder`` and not changed afterwards. Conclusions from it (``facts.read``) are kept separately.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from .inputs import Inputs, tensors_in

Where = tuple[tuple[types.CodeType, int], ...]  # frames of a module's own methods, innermost first: code and f_lasti


@dataclass(frozen=True)
class Conv:
    """The properties of a convolution."""

    kernel: tuple[int, ...]
    groups: int
    inputs: int
    outputs: int
    transposed: bool

    @property
    def spatial(self) -> bool:
        return any(k > 1 for k in self.kernel)

    @property
    def depthwise(self) -> bool:
        return self.spatial and 1 < self.groups == self.inputs and self.outputs % self.inputs == 0


@dataclass(eq=False)
class Op:
    """What is known of a node of a record's graph whose value is a tensor: an operation, or a tensor given to the run.

    Attributes:
        index: its position in the order of execution.
        name: of the ATen operation, without the in-place variant's underscore; of a module's class; "input" or "param".
        inputs: the operations whose tensors it takes.
        args, kwargs: its arguments, with None in place of tensors.
        shape, dtype: shape and dtype of its value.
        call: the innermost call of a module in which it happens; a module that counts as one operation has no call.
        module, path: that module, and its path in the model; for a "param", the path of the parameter or buffer.
        where: the frames of the calling module's own methods in which it happened.
        inplace: whether it changes its first input.
        activated: whether a module that counts as one operation ends in an activation (torch.ao's ``ConvReLU2d``).
        node: its node in the graph; None in the record of a run that is only compared with another.

    Determined by ``facts.read``: ``role`` (see ``roles``), ``conv``, ``ancestors`` (a bit set of indices), and

        takes: its inputs as far as they count: for ``x * sigmoid(x)``, which is an activation, only ``x``.
        users: the operations that take its value.
        channel_dim: the channel dim of its output, counted from the end, if it is known.
        pooled: whether it is computed from a value that was pooled over spatial dims, and not resized back since.
        flat: whether it is pooled over all of them, so that no space is left.
        excited: whether it is pooled, and a learned layer or a non-linearity has been applied since.
    """

    index: int
    name: str
    inputs: tuple[Op, ...]
    args: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype
    call: Call
    module: nn.Module | None = None
    path: str | None = None
    where: Where = ()
    inplace: bool = False
    activated: bool = False
    node: fx.Node | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    role: str = ""
    conv: Conv | None = None
    takes: tuple[Op, ...] = ()
    users: list[Op] = field(default_factory=list)
    channel_dim: int | None = None
    pooled: bool = False
    flat: bool = False
    excited: bool = False
    ancestors: int = 0

    @property
    def bit(self) -> int:
        return 1 << self.index

    @property
    def lineage(self) -> int:
        """The bits of the operation and of all operations that it depends on."""
        return self.ancestors | self.bit

    @property
    def dim(self) -> int:
        return len(self.shape)

    @property
    def spatial_conv(self) -> bool:
        """Whether it is a convolution over space (one in a channel gate, as in ECA, runs over channels)."""
        return self.conv is not None and self.conv.spatial and not self.flat

    @property
    def depthwise(self) -> bool:
        return self.conv is not None and self.conv.depthwise

    @property
    def channels(self) -> int | None:
        if self.channel_dim is None or self.dim < -self.channel_dim:
            return None
        return int(self.shape[self.channel_dim])

    @property
    def data(self) -> tuple[Op, ...]:
        """The inputs that depend on the network's input."""
        return tuple(i for i in self.takes if i.role != "param")

    def __repr__(self) -> str:
        return f"<{self.index} {self.name} {tuple(self.shape)} {self.role} in {self.call.path!r}>"


@dataclass(eq=False)
class Call:
    """A call of a module (of the copy that was run): its operations have the indices from ``start`` to ``end``.

    Attributes:
        inputs, outputs: the operations whose tensors it took and returned.
        returned: the operation whose tensor it returned, if it returned a single tensor.
        where: the frames of the calling module's own methods in which it was called.
        passes: the modules without effect that it called (``nn.Identity``), each with the value that was passed.
    """

    module: nn.Module
    path: str
    parent: Call | None
    start: int
    where: Where = ()
    inputs: list[Op] = field(default_factory=list)
    outputs: list[Op] = field(default_factory=list)
    returned: Op | None = None
    end: int = 0
    children: list[Call] = field(default_factory=list)
    passes: list[tuple[Op, nn.Module, str]] = field(default_factory=list)

    @property
    def mask(self) -> int:
        return (1 << self.end) - (1 << self.start)

    def holds(self, op: Op) -> bool:
        return self.start <= op.index < self.end

    def region(self, op: Op, outside: int = 0) -> int:
        """Return the bits of the operations of this call that a value depends on, except those ``outside``."""
        return op.lineage & self.mask & ~outside

    def child_with(self, op: Op) -> Call | None:
        """Return the call made by this one in which an operation happens."""
        return next((child for child in self.children if child.holds(op)), None)

    def where_of(self, op: Op) -> Where:
        """Return the frames of this module's own methods in which an operation happens."""
        child = None if op.call is self else self.child_with(op)
        return op.where if child is None else child.where

    def shows(self, op: Op) -> bool:
        """Return whether an operation's output is a value in this module's own code: made there, or returned to it."""
        return (op.call is self) or any(op in child.outputs for child in self.children)


@dataclass(eq=False)
class Record:
    """The record of one run of a model.

    Attributes:
        model, inputs: the copy that was run, and the inputs that it was called with.
        graph: every operation of the run, in order. Inputs are placeholders, parameters and buffers ``get_attr`` nodes, a module
            of ``torch.nn`` (which counts as one operation) a ``call_module`` node, and everything else the
            ``call_function`` node of an ATen overload. It can be run at the recorded sizes if all tensors are inputs,
            parameters or buffers: a tensor from elsewhere is a ``get_attr`` node named ``constant``. ``node.meta`` has
            ``"shape"``, ``"dtype"``, ``"call"`` (of the module in which it happens) and ``"where"`` (see ``Op``).
        ops: what is known of the nodes whose values are tensors, in order.
        calls: the calls of modules that don't count as one operation, parents before children.
        broke_off: the reason if the run ended early; ``broke_in`` is the path of the module that counts as one
            operation, if it was one that raised the error.
    """

    model: nn.Module
    inputs: Inputs
    graph: fx.Graph = field(default_factory=fx.Graph)
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    broke_off: str | None = None
    broke_in: str | None = None

    @cached_property
    def op_of(self) -> dict[fx.Node, Op]:
        """What is known of each node whose value is a tensor."""
        return {op.node: op for op in self.ops if op.node is not None}

    def select(self, bits: int) -> Iterator[Op]:
        """Yield the operations of a bit set, in order."""
        while bits:
            low = bits & -bits
            yield self.ops[low.bit_length() - 1]
            bits ^= low


# The functions of nodes for which ATen has none -----------------------------------------------------------------------


def tensor_of(value: Any, index: int) -> torch.Tensor:
    return tensors_in(value)[index]


def rewritten(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return a value whose data was changed through an alias, by an operation that wrote to a view of it, say."""
    return value
