"""The inputs that a model is recorded with: those that were given, or inputs that it may accept."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import brief
from .copying import copied, on_cpu


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of_one(self) -> Inputs:
        """Return a batch of one, if the tensors are batches."""
        return Inputs(tuple(a[:1] if isinstance(a, Tensor) else a for a in self.args), self.kwargs)

    def with_values(self, generator: torch.Generator) -> Inputs:
        """Return the same inputs on the CPU; tensors without values get random ones (integers: zeros)."""

        def real(tensor: Tensor) -> Tensor:
            if tensor.is_meta and (tensor.is_floating_point() or tensor.is_complex()):
                return torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)
            return on_cpu(tensor)

        return copied(self, real)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors; the run is on the device of the first one."""
        return tensors_in((self.args, self.kwargs))

    @property
    def is_meta(self) -> bool:
        return all(tensor.device.type == "meta" for tensor in self.tensors)

    @property
    def shapes(self) -> str:
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors) or "none"


def given_inputs(example_inputs: Any) -> Inputs:
    """Return ``example_inputs`` as the arguments of a call.

    A tensor, a dataclass or any other object is the only positional input; a tuple holds the positional inputs; a dict
    the keyword inputs; ``(args, kwargs)``, a tuple and a dict, both.

    Raises:
        TypeError: If it is a list, which could be meant either way, or holds no tensor at all.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, list) or not tensors_in(example_inputs):
        raise TypeError(
            "example_inputs must hold at least one tensor: a tensor, a tuple of positional inputs, a dict of keyword inputs "
            f"or (args, kwargs); got {type(example_inputs).__name__}. A model that takes one list takes example_inputs=([...],)"
        )
    if type(example_inputs) is tuple:
        if len(example_inputs) == 2 and type(example_inputs[0]) is tuple and type(example_inputs[1]) is dict:
            return Inputs(*example_inputs)
        return Inputs(example_inputs)
    if type(example_inputs) in (dict, OrderedDict) and all(isinstance(k, str) for k in example_inputs):
        return Inputs((), dict(example_inputs))
    return Inputs((example_inputs,))


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in a structure of tuples, lists, dicts, dataclasses and plain objects, in order."""
    if type(value) is Tensor:
        return [value]
    found: list[Tensor] = []
    _collect(value, found, 0)
    return found


_HOLDS_NOTHING = frozenset((str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size))


def _collect(value: Any, found: list[Tensor], depth: int) -> None:
    items: Any
    if isinstance(value, Tensor):
        found.append(value)
        return
    if isinstance(value, (list, tuple, set, frozenset)):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    elif isinstance(value, (nn.Module, type)) or type(value).__module__.partition(".")[0] in _LIBRARIES:
        return
    else:
        items = getattr(value, "__dict__", {}).values()
    for item in items if depth <= 6 else ():
        cls = type(item)  # handled here, because nearly everything is in a tuple
        if cls is Tensor:
            found.append(item)
        elif cls not in _HOLDS_NOTHING:
            _collect(item, found, depth + 1)


_LIBRARIES = ("builtins", "numpy", "torch")  # whose objects hold no inputs


# Inputs that a model may take -----------------------------------------------------------------------------------------

# Sizes to try if neither the caller nor the model specifies the input. A classifier that flattens its features accepts
# only one size, which is why there are so many.
_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(n,) for n in (16000, 1024, 4096, 512, 256, 128, 100, 64, 32, 2048, 8000, 8192, 32000, 44100, 48000)],
    2: [(n, n) for n in (224, 32, 64, 28, 128, 256, 96, 299, 48, 16, 8, 384, 512, 112, 160, 192, 320, 448, 227)],
    3: [
        (depth, n, n)
        for depth, n in ((16, 112), (16, 224), (32, 32), (64, 64), (16, 16), (96, 96), (8, 64), (128, 128), (32, 224))
    ],
}
_SIZE_NAMES = ("image_size", "img_size", "in_size", "input_size", "resolution", "sample_size", "input_resolution")
_CONFIG_NAMES = ("pretrained_cfg", "default_cfg", "config", "cfg", "hparams")


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs (on meta) that the model may accept, the most likely ones first."""
    conv = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    dtype = float_dtype(model)
    count = _required_inputs(model)
    shapes = list(_kept_shapes(model, conv))
    if conv is not None:
        dims = len(conv.kernel_size)
        shapes += [(conv.in_channels, *size) for size in _SIZES[dims]]
        if dims == 2:
            shapes.append((3, 224, 224))  # the first conv registered need not be the first one called
    for shape in dict.fromkeys(shapes):
        yield Inputs(tuple(torch.empty(2, *shape, dtype=dtype, device="meta") for _ in range(count)))
    if conv is not None and len(conv.kernel_size) == 2 and count == 1:  # detection models take a list of images
        yield Inputs(([torch.empty(conv.in_channels, 320, 320, dtype=dtype, device="meta")],))


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's floating-point parameters; that of the first one if they differ."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _kept_shapes(model: nn.Module, conv: Any) -> Iterator[tuple[int, ...]]:
    """Yield image shapes from the sizes that the model, its config (timm's, say) or one of its direct children has."""
    dims = 2 if conv is None else len(conv.kernel_size)
    for module in (model, *model.children()):
        for holder in (*map(vars(module).get, _CONFIG_NAMES), vars(module)):
            for name in _SIZE_NAMES:
                size = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
                size = (size,) * dims if type(size) is int else size
                if not isinstance(size, (tuple, list)) or not all(type(n) is int and 0 < n < 1e5 for n in size):
                    continue
                if len(size) > dims:
                    yield tuple(size)
                if len(size) >= dims and conv is not None:
                    yield (conv.in_channels, *size[-dims:])


def _required_inputs(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


# Shapes as plain data -------------------------------------------------------------------------------------------------


def describe(inputs: Inputs, model: nn.Module) -> Any:
    """Return the inputs of a model as plain data that JSON can hold, with the shape and dtype of each tensor and the
    model's dtype; None if they hold anything that can't be represented that way."""
    try:
        args, kwargs = [_described(a) for a in inputs.args], _described(inputs.kwargs)["dict"]
    except TypeError:
        return None
    return {"args": args, "kwargs": kwargs, "dtype": _name(float_dtype(model))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": _name(value.dtype)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(v) for v in value]}
    if type(value) in (dict, OrderedDict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _described(v) for k, v in value.items()}}
    raise TypeError(f"a {type(value).__name__} can't be written as plain data")


def described_inputs(description: Any, model: nn.Module) -> Inputs | None:
    """Rebuild inputs (on meta) from the result of ``describe``, in the model's current dtype; None if there is none.

    Raises:
        ValueError: If it is not such a description.
    """
    if description is None:
        return None
    try:
        args, kwargs = description["args"], description["kwargs"]
        if not (isinstance(args, list) and isinstance(kwargs, dict)):
            raise ValueError("not a description of inputs: args must be a list and kwargs a dict")
        inputs = Inputs(tuple(map(_restored, args)), {name: _restored(value) for name, value in kwargs.items()})
        return in_dtype_of(model, inputs, _dtype(description["dtype"]) if "dtype" in description else None)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a description of inputs: {error!r}") from error


def in_dtype_of(model: nn.Module, inputs: Inputs, before: torch.dtype | None) -> Inputs:
    """Convert inputs for a network of dtype ``before`` (None: any floating-point dtype) to the dtype of ``model``."""
    now = float_dtype(model)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(now) if tensor.is_floating_point() and before in (None, tensor.dtype) else tensor

    return copied(inputs, cast)


def _restored(value: Any) -> Any:
    match value:
        case {"tensor": shape, "dtype": dtype}:
            return torch.empty(shape, dtype=_dtype(dtype), device="meta")
        case {"list": items}:
            return [_restored(item) for item in items]
        case {"tuple": items}:
            return tuple(map(_restored, items))
        case {"dict": items}:
            return {key: _restored(item) for key, item in items.items()}
        case dict() | list():
            raise TypeError(f"{brief(value)} is neither a value nor marked as what it is")
    return value


def _dtype(name: str) -> torch.dtype:
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype
