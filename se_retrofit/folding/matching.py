"""Two networks side by side: their layers and channel gates in the order of execution, matched by shape.

A gate is recognised by what it computes: a value times the sigmoid of two linear layers, with a ReLU between them, of
the value's own mean over space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError
from ..surgery.blocks.questions import is_gate
from ..surgery.record.graph import Op, Record
from ..surgery.splice.undo import is_retrofitted


@dataclass(frozen=True, eq=False)
class Layer:
    """An operation with weights: the paths of its parameters and buffers, and their shapes."""

    name: str
    tensors: tuple[tuple[str, torch.Size], ...]

    @property
    def shapes(self) -> list[torch.Size]:
        return [shape for _, shape in self.tensors]

    def __str__(self) -> str:
        first = self.tensors[0][0].rpartition(".")[0] or self.tensors[0][0]
        return f"{first} ({self.name}, {', '.join(str(tuple(shape)) for _, shape in self.tensors[:2])})"


@dataclass(frozen=True, eq=False)
class Gate:
    """A channel gate: its path, numbers of channels and hidden units, and the paths of its weights (None: no bias)."""

    path: str
    channels: int
    hidden: int
    weights: tuple[str, str]
    biases: tuple[str | None, str | None]

    @property
    def shapes(self) -> tuple[int, int]:
        return self.channels, self.hidden

    def __str__(self) -> str:
        return f"the gate at {self.path} ({self.channels} channels, hidden {self.hidden})"


Part = Layer | Gate


def parts_of(record: Record) -> list[Part]:
    """Return the layers and gates of a record, each once, in the order of execution."""
    gates: dict[Op, Gate] = {}
    inside: set[Op] = set()
    for op in record.ops:
        if is_gate(op):
            gates[op], own = _native_gate(op)
            inside |= own
    parts: dict[Any, Part] = {}
    for op in record.ops:
        if op in gates:
            parts.setdefault(("gate", gates[op].path), gates[op])
        elif op.module is not None and is_retrofitted(op.module) and op.path is not None:
            parts.setdefault(("gate", op.path), _own_gate(op.path, op.module))
        elif op not in inside and op.role != "param":
            tensors = tuple(_tensors(op))
            if tensors:
                parts.setdefault(tensors, Layer(op.name, tensors))
    return list(parts.values())


def _own_gate(path: str, se: Any) -> Gate:
    biases = [f"{path}.fc.{i}.bias" if se.fc[i].bias is not None else None for i in (0, 2)]
    return Gate(path, se.channel, se.hidden, (f"{path}.fc.0.weight", f"{path}.fc.2.weight"), (biases[0], biases[1]))


def _native_gate(product: Op) -> tuple[Gate, set[Op]]:
    gate, scaled = product.data if product.data[0].flat else reversed(product.data)
    path = gate.call.path  # "" only where the network itself computes the gate
    op, own, layers = gate, {product}, []
    for wanted in ("sigmoid", "layer", "relu", "layer", "pool"):
        while op.role in ("pass", "shape") and len(op.data) == 1:
            own.add(op)
            op = op.data[0]
        own.add(op)
        if wanted == "layer":
            layers.append(op)
        right = {
            "sigmoid": op.name.lower() == "sigmoid",
            "relu": op.name.lower() == "relu",
            "layer": op.role == "linear" or (op.conv is not None and not op.conv.spatial),
            "pool": op.role == "pool" and (op.name == "mean" or "avg" in op.name.lower()),
        }[wanted]
        if not right or len(op.data) != 1:
            raise RetrofitError(
                f"the gate at {path or 'the model'} is not the sigmoid of two linear layers with a ReLU "
                f"between them: it has {op.name} where {wanted if wanted != 'layer' else 'a linear layer'} is expected"
            )
        op = op.data[0]
    while op is not scaled and op.role in ("pass", "shape") and len(op.data) == 1:
        own.add(op)
        op = op.data[0]
    if op is not scaled:
        raise RetrofitError(f"the gate at {path or 'the model'} is not computed from the value that it scales")
    second, first = ([name for name, _ in _tensors(layer)] for layer in layers)
    if not first or not second:
        raise RetrofitError(f"the weights of the gate at {path or 'the model'} are not parameters of the network")
    shape = next(_tensors(layers[1]))[1]
    biases = (first[1] if len(first) > 1 else None, second[1] if len(second) > 1 else None)
    return Gate(path, int(shape[1]), int(shape[0]), (first[0], second[0]), biases), own


def _tensors(op: Op) -> Iterator[tuple[str, torch.Size]]:
    """Yield the parameters and buffers that an operation uses, in the order of its arguments."""
    if op.module is not None and op.path is not None:
        named = [*op.module.named_parameters(), *op.module.named_buffers()]
        for name, tensor in named:
            if name != "num_batches_tracked":
                yield f"{op.path}.{name}", tensor.shape
        return
    for given in op.inputs:
        yield from _leaves(given)


def _leaves(op: Op) -> Iterator[tuple[str, torch.Size]]:
    if op.role == "param":
        if op.path is not None:
            yield op.path, op.shape
        for given in op.inputs:
            yield from _leaves(given)


def matched(ours: list[Part], theirs: list[Part]) -> list[tuple[Part, Part]]:
    """Pair the parts of a retrofitted network with those of a native one."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if type(a) is not type(b) or a.shapes != b.shapes:
            gates = isinstance(a, Gate) and isinstance(b, Gate)
            raise RetrofitError(
                f"the native network does not fit: part {index + 1} in the order of execution is {a} in the retrofitted network and "
                f"{b} in the native one"
                + ("; retrofit with the native network's reduction and min_hidden" if gates else "")
            )
    if len(ours) != len(theirs):
        longer, which = (ours, "retrofitted") if len(ours) > len(theirs) else (theirs, "native")
        raise RetrofitError(
            f"the native network does not fit: the retrofitted one has {len(ours)} layers and gates, the native one "
            f"{len(theirs)}; the first that is left over is {longer[min(len(ours), len(theirs))]} of the {which} one"
        )
    return list(zip(ours, theirs, strict=True))


def copy_layers(pairs: list[tuple[Part, Part]], source: nn.Module, target: nn.Module) -> None:
    """Copy the values of each part of ``source``, the first of a pair, to that of ``target``; all or nothing."""
    values, own = source.state_dict(), target.state_dict()
    copies: list[tuple[Tensor, Tensor]] = []
    for a, b in pairs:
        if isinstance(a, Layer) and isinstance(b, Layer):
            copies += [(own[to], values[of]) for (of, _), (to, _) in zip(a.tensors, b.tensors, strict=True)]
            counts = [f"{part.tensors[0][0].rpartition('.')[0]}.num_batches_tracked" for part in (a, b)]
            if counts[0] in values and counts[1] in own:
                copies.append((own[counts[1]], values[counts[0]]))
        elif isinstance(a, Gate) and isinstance(b, Gate):
            copies += [(own[to], values[of]) for of, to in zip(a.weights, b.weights, strict=True)]
            for of_bias, to_bias in zip(a.biases, b.biases, strict=True):
                bias = None if of_bias is None else values[of_bias]
                if to_bias is not None:
                    copies.append((own[to_bias], torch.zeros(()) if bias is None else bias))
                elif bias is not None and bias.any():
                    raise RetrofitError(
                        f"{a} has biases, but {b} has none; retrofit with bias=True, or build the native one with biases"
                    )
    with torch.no_grad():
        for to, of in copies:
            to.copy_(of.reshape(to.shape) if of.dim() else of.expand(to.shape))
