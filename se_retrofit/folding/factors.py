"""Where to fold a factor for each channel of a value, so that the product is not needed and the network stays the same.

Backwards from the value, into the weights and biases of the norms and convolutions that compute it: through positively
homogeneous activations (ReLU, LeakyReLU), changes of layout, pooling, sums (into all operands) and concatenations (into
each source its part). Or forwards, into the weights of all convolutions and linear layers that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.record.facts import real_users
from ..surgery.record.graph import Op, Record
from .probing import Scales, along, scales_input, scales_output

# f(c * x) == c * f(x), by the names of modules and of ATen operations without their numbers of dims: for c >= 0; for all c
_HOMOGENEOUS = {
    "ReLU", "relu", "LeakyReLU", "leaky_relu", "PReLU", "prelu", "_prelu_kernel", "MaxPool", "AdaptiveMaxPool", "max_pool",
    "adaptive_max_pool",
}  # fmt: skip
_LINEAR = {
    "AvgPool", "AdaptiveAvgPool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "permute", "transpose", "view",
    "reshape", "_unsafe_view", "_reshape_alias", "flatten", "Flatten", "unsqueeze", "Identity", "Dropout", "clone",
    "contiguous", "alias", "detach", "dropout", "feature_dropout", "native_dropout",
}  # fmt: skip
_RESIZED = ("_upsample_", "Upsample", "upsample")


@dataclass(frozen=True, eq=False)
class Scaling:
    """The multiplication of a parameter by ``factor`` (float64, in a shape that broadcasts), for one operation."""

    path: str
    factor: Tensor
    op: Op

    def apply(self, model: nn.Module) -> None:
        parameter = model.get_parameter(self.path)
        with torch.no_grad():
            scaled = parameter.double() * self.factor.to(parameter.device)
            parameter.copy_(scaled.to(parameter.dtype))


class Factors:
    """Finds where factors can be folded in a recorded network; ``transparent`` are SE modules with constant gates."""

    def __init__(self, model: nn.Module, record: Record, transparent: Iterable[str] = ()) -> None:
        self.model = model
        self.record = record
        self.transparent = set(transparent)
        self.returned = set(record.calls[0].outputs) if record.calls else set()
        self.parameters = {id(p): name for name, p in record.model.named_parameters()}
        self.uses = self._uses()

    def backwards(self, path: str, factor: Tensor) -> list[Scaling] | None:
        """Return how to multiply the value that the SE module at ``path`` scales by ``factor``, or None."""
        return self._for_all_calls(path, lambda op: self._made(op.data[0], op, factor))

    def forwards(self, path: str, factor: Tensor) -> list[Scaling] | None:
        """Return how all users of the SE module's output can act as if it were multiplied by ``factor``, or None."""
        return self._for_all_calls(path, lambda op: self._taken(op, factor))

    def _for_all_calls(self, path: str, find: Callable[[Op], list[Scaling] | None]) -> list[Scaling] | None:
        ops = [op for op in self.record.ops if op.role == "se" and op.path == path]
        found = self._all(map(find, ops))
        return self._once(found) if found else None

    def _once(self, scalings: list[Scaling]) -> list[Scaling] | None:
        """Return each parameter once; if it is used several times, every use must need the same factor."""
        by_path: dict[str, list[Scaling]] = {}
        for scaling in scalings:
            by_path.setdefault(scaling.path, []).append(scaling)
        for path, several in by_path.items():
            ops = [s.op for s in several]
            if len(set(ops)) != len(ops) or set(ops) != self.uses.get(path, set()):
                return None
            if not all(torch.equal(s.factor, several[0].factor) for s in several):
                return None
        return [several[0] for several in by_path.values()]

    def _uses(self) -> dict[str, set[Op]]:
        """Return the operations that use each parameter, by its path."""
        uses: dict[str, set[Op]] = {}
        for op in self.record.ops:
            for parameter in op.module.parameters() if op.module is not None else ():
                uses.setdefault(self.parameters[id(parameter)], set()).add(op)
            if op.name == "param" and op.path is not None:
                todo, users = [op], uses.setdefault(op.path, set())
                while todo:  # through values that are computed from parameters only
                    for user in todo.pop().users:
                        (todo.append if user.role == "param" else users.add)(user)
        return uses

    def _made(self, op: Op, user: Op, factor: Tensor) -> list[Scaling] | None:
        """Multiply the value of an operation, which only ``user`` may use."""
        if real_users(op) != [user] or op in self.returned or op.channels != len(factor) or op.channel_dim is None:
            return None
        if op.role in ("conv", "linear", "norm"):
            return self._by_module_or_operation(op, factor)
        if self._lets_through(op, factor) and len(op.data) == 1:
            return self._made(op.data[0], op, factor) if self._same_channels(op.data[0], op) else None
        if op.role == "affine" and op.name in ("mul", "multiply", "div") and op.takes[0] is op.data[0]:
            return self._multiplied(op, factor)
        if op.role == "add" and len(op.data) == 2 and all(i.shape == op.shape for i in op.data):
            return self._all(self._made(i, op, factor) for i in op.data)
        if op.role == "cat" and op.data == op.takes and all(i.channel_dim == op.channel_dim for i in op.inputs):
            sizes = [i.channels or 0 for i in op.takes]
            if sum(sizes) != len(factor):
                return None
            parts = factor.split(sizes)
            return self._all((self._made(i, op, part) for i, part in zip(op.takes, parts, strict=True)))
        return None

    @staticmethod
    def _all(found: Iterable[list[Scaling] | None]) -> list[Scaling] | None:
        scalings: list[Scaling] = []
        for some in found:
            if some is None:
                return None
            scalings += some
        return scalings

    def _by_module_or_operation(self, op: Op, factor: Tensor) -> list[Scaling] | None:
        assert op.channel_dim is not None
        if op.module is not None:
            return self._probed(scales_output, op, factor, op.channel_dim)
        given = op.takes[1:3]  # weight and bias of F.conv2d, F.batch_norm and so on
        if op.role == "linear" or not given or not all(self._is_parameter(p) for p in given):
            return None
        transposed = op.conv is not None and op.conv.transposed
        if op.role == "conv" and (op.conv is None or (transposed and op.conv.groups > 1)):
            return None
        if op.role == "norm" and any(p.dim != 1 for p in given):
            return None
        own = list(zip(given, (int(transposed), 0), strict=False))
        if any(p.shape[dim] != len(factor) for p, dim in own):
            return None
        return [Scaling(str(p.path), along(factor, dim, p.dim), op) for p, dim in own]

    def _multiplied(self, op: Op, factor: Tensor) -> list[Scaling] | None:
        """Fold into a product: into its parameter, such as layer scale, or else further back, into what it scales."""
        for scale in op.takes[1:]:
            dim = scale.dim + (op.channel_dim or 0)
            one_each = dim >= 0 and scale.shape[dim] == scale.shape.numel() == len(factor)
            if op.name != "div" and one_each and scale.path is not None and self._is_parameter(scale):
                return [Scaling(scale.path, along(factor, dim, scale.dim), op)]
        return self._made(op.data[0], op, factor) if self._same_channels(op.data[0], op) else None

    def _taken(self, op: Op, factor: Tensor) -> list[Scaling] | None:
        users = real_users(op)
        if not users or op in self.returned:
            return None
        return self._all(self._taken_by(user, op, factor) for user in users)

    def _taken_by(self, user: Op, op: Op, factor: Tensor) -> list[Scaling] | None:
        if op.channel_dim is None or user.data != (op,) or user.inputs[0] is not op:
            return None
        if user.role in ("conv", "linear"):
            expected = -1 if user.conv is None else -len(user.conv.kernel) - 1
            if op.channel_dim != expected or op.channels != len(factor):
                return None
            if user.module is not None:
                return self._probed(scales_input, user, factor, expected)
            weight = user.inputs[1] if len(user.inputs) > 1 else None
            if weight is None or weight.path is None or not self._is_parameter(weight) or user.conv is None:
                return None
            if user.conv.groups > 1 or user.conv.transposed:
                return None
            return [Scaling(weight.path, along(factor, 1, weight.dim), user)]
        value = getattr(user.module, "value", 0) if user.name != "constant_pad_nd" else (*user.args[2:3], 0)[0]
        padded = user.role == "pad" and value == 0
        multiplied = user.role == "affine" and user.name in ("mul", "multiply", "div")
        if (self._lets_through(user, factor) or padded or multiplied) and self._same_channels(op, user):
            return self._taken(user, factor)
        return None

    def _lets_through(self, op: Op, factor: Tensor) -> bool:
        """Return whether an operation on one value commutes with a factor for each of its channels."""
        if op.role == "se":
            return op.path in self.transparent
        name = op.name.replace("_with_indices", "").rstrip("123d")
        if name in _HOMOGENEOUS:
            return bool((factor >= 0).all())
        return name in _LINEAR or name.startswith(_RESIZED)

    @staticmethod
    def _same_channels(before: Op, after: Op) -> bool:
        return before.channels is not None and before.channels == after.channels

    def _is_parameter(self, op: Op) -> bool:
        return op.name == "param" and op.path in self.parameters.values()

    def _probed(self, probe: Callable[..., Scales | None], op: Op, factor: Tensor, dim: int) -> list[Scaling] | None:
        twin: Any = op.module
        scales = probe(self.model.get_submodule(str(op.path)), op, factor, dim)
        if scales is None:
            return None
        return [Scaling(self.parameters[id(twin.get_parameter(name))], f, op) for name, f in scales.items()]
