"""The network as one flat graph of operations, read from the one-level graphs of its modules.

Each module that was called in the rehearsal is traced one level deep; where a child is called, the child's own graph
is put in. An operation has a role (conv, norm, act, add, cat, ...) and knows in whose graph it stands, so a block can
be recognised across module borders and changed where it stands.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from .rehearsal import Call, Rehearsal, base_class
from .tracing import Block, TraceFailure, trace

__all__ = ["Network", "Op", "Reading", "read"]


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
    """One operation on tensors.

    Attributes:
        index: its place in the network's order of execution.
        role: what it does: "input", "param", "conv", "linear", "norm", "act", "pool", "add", "mul", "cat", "affine" (by a
            parameter or a number), "pass" (identity, dropout), "shape", "part" (a piece of its input), "pad", "resize",
            "other".
        inputs: the operations whose tensors it takes.
        value: its meta value.
        call, node: in whose own graph it stands, and as which node.
        channel_dim: which dim of its value holds the channels, counted from the end, if that is known.
        pooled: it is computed from a pooled value and has not got its spatial extent back.
        excited: it is pooled, and a learned layer or a non-linearity has been applied since.
    """

    index: int
    role: str
    inputs: tuple[Op, ...]
    value: Any
    call: Call
    node: fx.Node | None
    conv: Conv | None = None
    channel_dim: int | None = None
    pooled: bool = False
    excited: bool = False
    ancestors: int = 0  # a bit set of indices
    users: list[Op] = field(default_factory=list)

    @property
    def bit(self) -> int:
        return 1 << self.index

    @property
    def spatial_conv(self) -> bool:
        """A convolution over space (one inside a channel gate, as in ECA, runs over channels)."""
        return self.conv is not None and self.conv.spatial and not self.pooled

    @property
    def channels(self) -> int | None:
        if self.channel_dim is None or not isinstance(self.value, Tensor) or self.value.dim() < -self.channel_dim:
            return None
        return int(self.value.shape[self.channel_dim])

    @property
    def data(self) -> tuple[Op, ...]:
        """Its inputs that depend on the network's input."""
        return tuple(i for i in self.inputs if i.role != "param")


Structure = Any  # an Op, or tuples, lists and dicts of them with plain values between


def ops_in(structure: Structure) -> list[Op]:
    """All operations in a structure, in order."""
    if isinstance(structure, Op):
        return [structure]
    if isinstance(structure, (list, tuple)):
        return [op for item in structure for op in ops_in(item)]
    if isinstance(structure, dict):
        return [op for item in structure.values() for op in ops_in(item)]
    return []


@dataclass(eq=False)
class Reading:
    """One call of a module whose own graph was put in: its operations have the indices from ``start`` to ``end``."""

    call: Call
    block: Block
    parent: Reading | None
    start: int
    inputs: list[Op]
    end: int = 0
    outputs: list[Op] = field(default_factory=list)
    ops: dict[fx.Node, Structure] = field(default_factory=dict)
    children: dict[fx.Node, Reading] = field(default_factory=dict)

    @property
    def mask(self) -> int:
        return (1 << self.end) - (1 << self.start)

    def holds(self, op: Op) -> bool:
        return self.start <= op.index < self.end

    def node_of(self, op: Op) -> fx.Node | None:
        """The first node of this module's own graph whose value is ``op``'s."""
        return self._nodes.get(op)

    @cached_property
    def _nodes(self) -> dict[Op, fx.Node]:
        nodes: dict[Op, fx.Node] = {}
        for node, structure in self.ops.items():
            if isinstance(structure, Op) and node.op != "placeholder":
                nodes.setdefault(structure, node)
        return nodes

    def node_around(self, op: Op) -> fx.Node | None:
        """The node of this module's own graph in which ``op`` happens."""
        if op.call is self.call:
            return op.node
        return next((node for node, child in self.children.items() if child.holds(op)), None)


@dataclass(eq=False)
class Network:
    """All operations of the rehearsed network."""

    ops: list[Op] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)  # parents before children
    failures: dict[Call, str] = field(default_factory=dict)

    def select(self, bits: int) -> Iterator[Op]:
        """The operations of a bit set, in order."""
        while bits:
            low = bits & -bits
            yield self.ops[low.bit_length() - 1]
            bits ^= low

    def innermost(self, ops: Iterable[Op]) -> Reading | None:
        """The innermost module in whose call all of these operations happen."""
        ops = list(ops)
        found = None
        for reading in self.readings:
            if all(map(reading.holds, ops)) and (found is None or reading.start >= found.start):
                found = reading
        return found


# Roles ------------------------------------------------------------------

_ACTIVATIONS = tuple(
    cls
    for cls in vars(nn.modules.activation).values()
    if isinstance(cls, type)
    and issubclass(cls, nn.Module)
    and cls.__module__ == nn.modules.activation.__name__
    and cls is not nn.MultiheadAttention
)
_MODULE_ROLES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.modules.conv._ConvNd,), "conv"),
    ((nn.Linear, nn.Bilinear), "linear"),
    ((nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm), "norm"),
    (_ACTIVATIONS, "act"),
    ((nn.Identity, nn.modules.dropout._DropoutNd), "pass"),
    (
        tuple(
            c
            for n, c in vars(nn.modules.pooling).items()
            if isinstance(c, type) and "Pool" in n and issubclass(c, nn.Module)
        ),
        "pool",
    ),
    ((nn.Upsample, nn.PixelShuffle), "resize"),
    ((nn.Flatten, nn.Unflatten, nn.PixelUnshuffle, nn.ChannelShuffle), "shape"),
    (tuple(c for n, c in vars(nn.modules.padding).items() if isinstance(c, type) and "Pad" in n), "pad"),
)

_FUNCTION_ROLES: dict[str, str] = {
    name: role
    for role, names in {
        "conv": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        "linear": "linear matmul bmm mm einsum addmm baddbmm",
        "norm": "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize",
        "act": "relu relu_ relu6 gelu silu silu_ hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid sigmoid_ tanh tanh_ "
        "leaky_relu leaky_relu_ elu elu_ selu celu prelu rrelu softplus mish hardtanh hardtanh_ clamp clamp_ softmax "
        "log_softmax logsigmoid softsign threshold glu erf exp",
        "pool": "mean sum amax amin avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d "
        "boolean_dispatch norm std var std_mean var_mean logsumexp",
        "add": "add add_ iadd sub sub_ isub",
        "mul": "mul mul_ imul div div_ truediv itruediv multiply",
        "cat": "cat concat concatenate",
        "resize": "interpolate upsample pixel_shuffle grid_sample",
        "pass": "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout contiguous clone to float half "
        "double bfloat16 type type_as detach expand_as requires_grad_ stochastic_depth drop_path",
        "shape": "view reshape permute transpose flatten unflatten squeeze unsqueeze expand swapaxes movedim moveaxis t "
        "swapdims unfold fold roll flip repeat pixel_unshuffle channel_shuffle stack tile broadcast_to view_as "
        "reshape_as rearrange",
        "part": "getitem chunk split narrow unbind tensor_split select index_select split_with_sizes",
        "pad": "pad",
    }.items()
    for name in names.split()
}


def _module_role(module: nn.Module) -> str | None:
    """The role of a module that is one operation; None if it is to be read."""
    cls = base_class(module)
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return "conv" if isinstance(module, nn.modules.conv._ConvNd) else "linear"
    if isinstance(module, (nn.Sequential, fx.GraphModule)) or not cls.__module__.startswith("torch.nn"):
        return None
    return _known_role(module) or "other"


def _known_role(module: nn.Module) -> str | None:
    return next((role for classes, role in _MODULE_ROLES if isinstance(module, classes)), None)


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _conv_of_module(m: Any) -> Conv:
    return Conv(tuple(m.kernel_size), m.groups, m.in_channels, m.out_channels, m.transposed)


def _conv_of_function(name: str, node: fx.Node, args: Structure, kwargs: Structure) -> Conv | None:
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    if not isinstance(weight, Op) or not isinstance(weight.value, Tensor):
        return None
    shape, transposed = tuple(weight.value.shape), "transpose" in name
    data = args[0] if args else kwargs.get("input")
    dims = len(shape) - 2
    inputs = int(data.value.shape[-dims - 1]) if isinstance(data, Op) and isinstance(data.value, Tensor) else shape[1]
    if transposed:
        return Conv(shape[2:], 1, shape[0], shape[1], True)
    return Conv(shape[2:], max(1, inputs // shape[1]), inputs, shape[0], False)


# The flat graph ------------------------------------------------------------------


class _Reader:
    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        self.network = Network()

    def read_all(self, call: Call) -> None:
        """Read a call; where it can't be traced, the calls below it, each on its own."""
        if _module_role(call.module) is not None:
            return
        block = self.traced(call)
        if block is None:
            for child in call.children:
                self.read_all(child)
            return
        structures = {}
        for node in block.graph.nodes:
            if node.op == "placeholder":
                structures[str(node.target).lstrip("*")] = self.inputs(block.values[node], call, node)
        self.read(call, block, structures, None)

    def traced(self, call: Call) -> Block | None:
        try:
            return trace(self.rehearsal.ghosts, call)
        except TraceFailure as failure:
            self.network.failures[call] = str(failure)
            return None

    def inputs(self, value: Any, call: Call, node: fx.Node) -> Structure:
        if isinstance(value, Tensor):
            return self.add("input", (), value, call, node)
        if isinstance(value, (list, tuple)):
            return [self.inputs(v, call, node) for v in value]
        if isinstance(value, dict):
            return {k: self.inputs(v, call, node) for k, v in value.items()}
        return value

    def add(
        self, role: str, inputs: tuple[Op, ...], value: Any, call: Call, node: fx.Node | None, conv: Conv | None = None
    ) -> Op:
        if role != "input" and all(i.role == "param" for i in inputs):
            role = "param"
        elif role in ("add", "mul") and sum(i.role != "param" for i in inputs) < 2:
            role = "affine"
        if role == "mul" and len(inputs) == 2:
            gated = _gated_by_itself(*inputs) or _gated_by_itself(*reversed(inputs))
            if gated is not None:  # x * sigmoid(x), an activation written out
                role, inputs = "act", gated
        op = Op(len(self.network.ops), role, inputs, value, call, node, conv)
        for source in inputs:
            op.ancestors |= source.ancestors | source.bit
            source.users.append(op)
        op.channel_dim = _channel_dim(op)
        if op.conv is not None and inputs:
            _tell_channels(inputs[0], op)
        elif role == "add" and op.channel_dim is not None:
            for operand in op.data:
                if isinstance(operand.value, Tensor) and operand.value.shape == value.shape:
                    operand.channel_dim = operand.channel_dim or op.channel_dim
        _follow_pooling(op)
        self.network.ops.append(op)
        return op

    def read(self, call: Call, block: Block, given: dict[str, Structure], parent: Reading | None) -> Structure:
        inputs = ops_in(list(given.values()))
        reading = Reading(call, block, parent, len(self.network.ops), inputs)
        self.network.readings.append(reading)
        ops = reading.ops

        def resolve(argument: Any) -> Structure:
            if isinstance(argument, fx.Node):
                return ops[argument]
            if isinstance(argument, (list, tuple)):
                return [resolve(a) for a in argument]
            if isinstance(argument, dict):
                return {k: resolve(v) for k, v in argument.items()}
            return argument

        result: Structure = None
        for node in block.graph.nodes:
            args, kwargs = resolve(node.args), resolve(node.kwargs)
            if node.op == "placeholder":
                ops[node] = given.get(str(node.target).lstrip("*"))
            elif node.op == "output":
                result = args[0]
                reading.outputs = ops_in(result)
            elif node.op == "get_attr":
                ops[node] = self.add("param", (), block.values[node], call, node)
            elif node.op == "call_module":
                ops[node] = self.read_module(reading, node, args, kwargs)
            else:
                ops[node] = self.read_function(reading, node, args, kwargs)
        reading.end = len(self.network.ops)
        return result

    def read_module(
        self, reading: Reading, node: fx.Node, args: list[Structure], kwargs: dict[str, Structure]
    ) -> Structure:
        call, block = reading.call, reading.block
        module = call.module.get_submodule(str(node.target))
        inputs = tuple(ops_in([args, kwargs]))
        value = block.values[node]
        role = _module_role(module)
        child_call = block.calls.get(node)
        if role is None and child_call is not None:
            child = self.traced(child_call)
            if child is not None:
                bound = _bind(module, args, kwargs)
                if bound is not None:
                    before = len(self.network.readings)
                    result = self.read(child_call, child, bound, reading)
                    reading.children[node] = self.network.readings[before]
                    return result
            else:  # it can't be read as a whole: its children on their own, and itself as one operation
                for grandchild in child_call.children:
                    self.read_all(grandchild)
        role = role or _known_role(module) or "other"
        conv = _conv_of_module(module) if role == "conv" else None
        return self.structured(role, inputs, value, call, node, conv)

    def structured(
        self, role: str, inputs: tuple[Op, ...], value: Any, call: Call, node: fx.Node, conv: Conv | None = None
    ) -> Structure:
        if (
            isinstance(value, (list, tuple))
            and type(value) is not torch.Size
            and any(isinstance(v, Tensor) for v in value)
        ):
            return [self.structured(role, inputs, v, call, node, conv) for v in value]
        if isinstance(value, dict):
            return {k: self.structured(role, inputs, v, call, node, conv) for k, v in value.items()}
        if value is None or isinstance(value, (bool, int, float, str, torch.Size, torch.dtype, torch.device)):
            return value
        return self.add(role, inputs, value, call, node, conv)

    def read_function(
        self, reading: Reading, node: fx.Node, args: list[Structure], kwargs: dict[str, Structure]
    ) -> Structure:
        name = _function_name(node)
        value = reading.block.values.get(node)
        if name == "getitem" and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        if name == "getitem" and isinstance(args[0], dict):  # the outputs of transformers are indexed by position, too
            return args[0][args[1]] if args[1] in args[0] else list(args[0].values())[args[1]]
        if name in ("add", "iadd") and isinstance(args[0], list) and isinstance(args[1], list):
            return args[0] + args[1]
        # x.expand_as(y) and the like take nothing but a shape or a type of y
        inputs = tuple(ops_in(args[:1] if name.endswith("_as") else [args, kwargs]))
        role = _FUNCTION_ROLES.get(name, "other")
        conv = _conv_of_function(name, node, args, kwargs) if role == "conv" else None
        if role == "conv" and conv is None:
            role = "other"
        return self.structured(role, inputs, value, reading.call, node, conv)


def _gated_by_itself(x: Op, gate: Op) -> tuple[Op] | None:
    """``x`` alone, if ``gate`` is an activation of ``x`` that nothing else takes."""
    first, activated = gate, False
    while first is not x:
        if (
            first.role not in ("act", "affine", "pass")
            or len(first.data) != 1
            or (first.users and first is not gate and len(first.users) != 1)
        ):
            return None
        activated = activated or first.role == "act"
        before = first.data[0]
        if before is x:
            if not activated or gate.users:
                return None
            x.users = [user for user in x.users if user is not first]
            return (x,)
        first = before
    return None


_signatures: dict[Any, inspect.Signature] = {}


def _bind(module: nn.Module, args: list[Structure], kwargs: dict[str, Structure]) -> dict[str, Structure] | None:
    """The structures that a child is called with, by the names of its forward's parameters."""
    if isinstance(module, fx.GraphModule):
        names = [n.target for n in module.graph.nodes if n.op == "placeholder"]
        return {**dict(zip(names, args, strict=False)), **kwargs}
    function = getattr(module.forward, "__func__", module.forward)
    if function not in _signatures:
        _signatures[function] = inspect.signature(module.forward)
    try:
        return dict(_signatures[function].bind(*args, **kwargs).arguments)
    except TypeError:
        return None


def _spatial(op: Op) -> tuple[int, ...]:
    """The sizes of a value's dims other than batch and channels; of one whose channels are unknown, all but the first two."""
    if not isinstance(op.value, Tensor):
        return ()
    shape = list(op.value.shape)
    if op.channel_dim is not None and len(shape) >= -op.channel_dim:
        del shape[op.channel_dim]
        return tuple(shape[1:])
    return tuple(shape[2:])


def _follow_pooling(op: Op) -> None:
    """Tell what is computed from a pooled value: the squeeze and the excitation of a channel gate."""
    data = op.data
    if not data or op.role in ("input", "param"):
        return
    widest = max(_extent(i) for i in data)
    extent = _extent(op)
    all_pooled = all(i.pooled for i in data)
    if all_pooled:
        op.pooled = True
        op.excited = any(i.excited for i in data) or op.role in ("conv", "linear", "act")
    elif op.role not in ("conv", "part", "cat", "add", "mul") and extent < widest:
        # one spatial dim at least is gone; or, where the pool is written as a product (GlobalContext), all of them
        before = next(i for i in data if _extent(i) == widest)
        if op.role == "pool":
            op.pooled = any(s == 1 for s in _spatial(op)) or len(_spatial(op)) < len(_spatial(before))
        elif extent == 1 and op.role in ("linear", "other", "shape"):
            op.pooled = op.role != "shape" or bool(_spatial(op))
    if op.role == "pool" and _is_global(op):
        op.pooled = True


def _extent(op: Op) -> int:
    size = 1
    for s in _spatial(op):
        size *= int(s)
    return size


def _is_global(op: Op) -> bool:
    """A pool that is global whatever the input's size is, which a small rehearsal can't show."""
    name = _function_name(op.node) if op.node is not None and op.node.op != "call_module" else ""
    spatial = _spatial(op)
    if name.startswith("adaptive") or name in ("mean", "amax", "sum"):
        return all(s == 1 for s in spatial) and isinstance(op.value, Tensor) and op.value.dim() >= 2
    if op.node is not None and op.node.op == "call_module":
        module = op.call.module.get_submodule(str(op.node.target))
        size = getattr(module, "output_size", None)
        return size is not None and all(s == 1 for s in (size if isinstance(size, tuple) else (size,)))
    return False


def _tell_channels(op: Op, conv: Op) -> None:
    """What a conv takes has its channels where the conv has them, and so have the values that it is made of in place."""
    while op.channel_dim is None and isinstance(op.value, Tensor) and op.value.dim() == conv.value.dim():
        op.channel_dim = conv.channel_dim
        if op.role not in ("norm", "act", "pass", "affine") or len(op.data) != 1:
            break
        op = op.data[0]


def _channel_dim(op: Op) -> int | None:
    """Which dim holds the channels of an operation's value."""
    value = op.value
    if not isinstance(value, Tensor):
        return op.data[0].channel_dim if op.data and op.role == "part" else None
    if op.conv is not None:
        return -len(op.conv.kernel) - 1
    data = op.data
    if not data:
        return None
    source = next((i for i in data if i.channel_dim is not None), data[0])
    name = _function_name(op.node) if op.node is not None and op.node.op != "call_module" else ""
    if op.role == "linear":
        return -1 if name in ("", "linear") else None
    if source.channel_dim is None or not isinstance(source.value, Tensor):
        if op.role == "norm" and name == "layer_norm":
            return -1
        return None
    before, after = source.value.dim(), value.dim()
    position = before + source.channel_dim
    if position < 0:
        return None
    if op.role == "shape":
        return _channel_dim_after(op, name, source.value, position)
    if before == after and (op.role != "other" or value.shape[position] == source.value.shape[position]):
        return source.channel_dim
    return None


def _channel_dim_after(op: Op, name: str, before: Tensor, position: int) -> int | None:
    """Which dim holds the channels after a change of shape."""
    value, node = op.value, op.node
    after = value.dim()
    if node is None or node.op == "call_module":
        return (
            position - after
            if after <= before.dim() and position < after - 0 and value.shape[position] == before.shape[position]
            else None
        )
    arguments: list[Any] = list(node.args[1:])
    if name == "permute":
        dims: Any = arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else arguments
        dims = dims or node.kwargs.get("dims", ())
        if all(isinstance(d, int) for d in dims) and len(dims) == after:
            return [d % after for d in dims].index(position) - after
        return None
    if name in ("transpose", "swapaxes", "swapdims"):
        pair = [*arguments, *node.kwargs.values()][:2]
        if len(pair) == 2 and all(isinstance(d, int) for d in pair):
            a, b = (int(d) % after for d in pair)
            return {a: b, b: a}.get(position, position) - after
        return None
    if name in ("flatten", "view", "reshape", "contiguous", "expand", "roll", "flip"):
        # the channels stay where they are if all dims up to them do; or if they are last and stay last
        if position < after and tuple(value.shape[: position + 1]) == tuple(before.shape[: position + 1]):
            return position - after
        if position == before.dim() - 1 and value.shape[-1] == before.shape[-1]:
            return -1
    return None


def read(rehearsal: Rehearsal) -> Network:
    """Read the rehearsed network into one flat graph."""
    reader = _Reader(rehearsal)
    reader.read_all(rehearsal.root)
    return reader.network
