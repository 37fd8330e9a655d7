"""A record of one run of a model: a ``torch.fx.Graph`` of every operation, and what is known of each of its nodes.

``recorder`` makes it; nothing changes it afterwards. What is concluded from it (``facts.read``) stands beside it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .inputs import Inputs, tensors_in

__all__ = ["Call", "Conv", "Op", "Record", "Where", "rewritten", "tensor_of"]

Where = tuple[tuple[types.CodeType, int], ...]  # frames of a module's own methods, innermost first: code and f_lasti


@dataclass(frozen=True)
class Conv:
    """What tells one convolution from another."""

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
    """What is known of one node of a record's graph whose value is a tensor: an operation, or a tensor that the run was given.

    Attributes:
        index: its place in the order of execution.
        name: of the ATen operation, without the in-place variant's underscore; of a module's class; "input" or "param".
        inputs: those whose tensors it takes.
        args, kwargs: what it takes beside them, with None in the place of tensors.
        shape, dtype: of its value.
        call: the innermost call of a module in which it happens; a module that counts as one operation has none.
        module, path: that module, and its path in the model; of a "param", the path of the parameter or buffer.
        where: in which frames of the calling module's own methods it was made.
        inplace: it changes its first input.
        node: its node in the graph; None in the record of a run that is only compared with another.

    Concluded by ``facts.read``: ``role`` (see ``roles``), ``conv``, ``ancestors`` (a bit set of indices), and

        takes: its inputs as far as they count: of ``x * sigmoid(x)``, which is an activation, ``x`` alone.
        users: the operations that take it.
        channel_dim: which dim of its output holds the channels, counted from the end, if that is known.
        pooled: it is computed from a value that was pooled over some of its spatial dims, and has not got that extent back.
        flat: it is pooled over all of them: no space is left.
        excited: it is pooled, and a learned layer or a non-linearity has been applied since.
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
        """The bits of the operation and of all of which it is made."""
        return self.ancestors | self.bit

    @property
    def dim(self) -> int:
        return len(self.shape)

    @property
    def spatial_conv(self) -> bool:
        """A convolution over space (one inside a channel gate, as in ECA, runs over channels)."""
        return self.conv is not None and self.conv.spatial and not self.flat

    @property
    def channels(self) -> int | None:
        if self.channel_dim is None or self.dim < -self.channel_dim:
            return None
        return int(self.shape[self.channel_dim])

    @property
    def data(self) -> tuple[Op, ...]:
        """What it takes that depends on the network's input."""
        return tuple(i for i in self.takes if i.role != "param")

    def __repr__(self) -> str:
        return f"<{self.index} {self.name} {tuple(self.shape)} {self.role} in {self.call.path!r}>"


@dataclass(eq=False)
class Call:
    """One call of one module (of the copy that was run): its operations have the indices from ``start`` to ``end``.

    Attributes:
        inputs, outputs: the operations whose tensors it was given and returned.
        returned: the operation whose tensor is all that it returned, if that is one tensor.
        where: in which frames of the calling module's own methods it was called.
        passes: the modules that it called to no effect (``nn.Identity``), each with the value that was passed.
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
        """The bits of the operations of this call of which a value is made, but for those ``outside``."""
        return op.lineage & self.mask & ~outside

    def child_with(self, op: Op) -> Call | None:
        """The call made by this one in which an operation happens."""
        return next((child for child in self.children if child.holds(op)), None)

    def where_of(self, op: Op) -> Where:
        """In which frames of this module's own methods an operation happens."""
        child = None if op.call is self else self.child_with(op)
        return op.where if child is None else child.where

    def shows(self, op: Op) -> bool:
        """Whether an operation's output is a value in this module's own code: made there, or returned to it."""
        return (op.call is self) or any(op in child.outputs for child in self.children)


@dataclass(eq=False)
class Record:
    """One run of a model.

    Attributes:
        model, inputs: the copy that was run, and what it was called with.
        graph: every operation of the run, in order. Inputs are placeholders, parameters and buffers ``get_attr`` nodes, a module
            of ``torch.nn`` (which counts as one operation) a ``call_module`` node, all else the ``call_function`` node of an
            ATen overload. It runs at the recorded sizes, where all tensors are inputs, parameters or buffers: a tensor that the code
            takes from elsewhere is a ``get_attr`` node named ``constant``. ``node.meta`` has ``"shape"`` and ``"dtype"`` of the value, ``"call"``, the call of the module in
            which the operation happens, and ``"where"``, the frames of that module's own methods at that time.
        ops: what is known of the nodes whose values are tensors, in order.
        calls: the calls of modules that don't count as one operation, parents before children.
        broke_off: where the run ended early, why; ``broke_in`` is the path of the module that counts as one operation, if
            it was one that raised.
    """

    model: nn.Module
    inputs: Inputs
    graph: fx.Graph = field(default_factory=fx.Graph)
    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    broke_off: str | None = None
    broke_in: str | None = None

    def select(self, bits: int) -> Iterator[Op]:
        """The operations of a bit set, in order."""
        while bits:
            low = bits & -bits
            yield self.ops[low.bit_length() - 1]
            bits ^= low


# What a node's function is where ATen has none ------------------------------------------------------------------------


def tensor_of(value: Any, index: int) -> torch.Tensor:
    """One of the tensors that an operation returned."""
    return tensors_in(value)[index]


def rewritten(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """A value whose data was changed under another name, by an operation that wrote to a view of it, say."""
    return value
