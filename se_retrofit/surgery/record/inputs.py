"""What a model is called with when it is recorded: the inputs that were given, or inputs that it may take."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .copying import copied, on_meta

__all__ = [
    "Inputs",
    "candidate_inputs",
    "describe",
    "described_inputs",
    "float_dtype",
    "given_inputs",
    "in_dtype_of",
    "tensors_in",
]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def on_meta(self) -> Inputs:
        return copied(self, on_meta)

    def of_one(self) -> Inputs:
        """A batch of one where the tensors are batches."""
        return Inputs(tuple(a[:1] if isinstance(a, Tensor) else a for a in self.args), self.kwargs)

    def with_values(self, generator: torch.Generator) -> Inputs:
        """The same on the CPU; tensors that have no values get random ones (integers: zeros)."""

        def real(tensor: Tensor) -> Tensor:
            if tensor.device.type != "meta":
                return tensor.detach().to("cpu", copy=True)
            if tensor.is_floating_point() or tensor.is_complex():
                return torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

        return copied(self, real)

    @property
    def is_meta(self) -> bool:
        return all(t.device.type == "meta" for t in tensors_in((self.args, self.kwargs)))

    @property
    def shapes(self) -> str:
        return ", ".join(str(tuple(t.shape)) for t in tensors_in((self.args, self.kwargs))) or "none"


def given_inputs(example_inputs: Any) -> Inputs:
    """``example_inputs`` as the arguments of a call.

    A tensor, a dataclass or any other object is the one positional input; a tuple holds the positional inputs; a dict the
    keyword inputs; ``(args, kwargs)``, a tuple and a dict, both.

    Raises:
        TypeError: it is a list, which could be meant either way, or holds no tensor at all.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, list):
        raise TypeError(
            "example_inputs must be a tensor, a tuple of positional inputs, a dict of keyword inputs or (args, kwargs), got "
            "a list; a model that takes one list takes example_inputs=([...],)"
        )
    if not tensors_in(example_inputs):
        raise TypeError(
            "example_inputs must hold at least one tensor: a tensor, a tuple of positional inputs, a dict of keyword inputs "
            f"or (args, kwargs); got {type(example_inputs).__name__}"
        )
    if type(example_inputs) is tuple:
        if len(example_inputs) == 2 and type(example_inputs[0]) is tuple and type(example_inputs[1]) is dict:
            return Inputs(*example_inputs)
        return Inputs(example_inputs)
    if type(example_inputs) in (dict, OrderedDict) and all(isinstance(k, str) for k in example_inputs):
        return Inputs((), dict(example_inputs))
    return Inputs((example_inputs,))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a structure of tuples, lists, dicts, dataclasses and plain objects, in order."""
    if type(value) is Tensor:
        return [value]
    found: list[Tensor] = []
    _collect(value, found, 0)
    return found


_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device, nn.Module, type)
_HOLDS_NOTHING = frozenset((str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size))


def _collect(value: Any, found: list[Tensor], depth: int) -> None:
    if type(value) in _HOLDS_NOTHING:
        return
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, _PLAIN) or depth > 6:
        return
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            cls = type(item)  # looked at here, because nearly all of what is collected is in a tuple
            if cls is Tensor:
                found.append(item)
            elif cls not in _HOLDS_NOTHING:
                _collect(item, found, depth + 1)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found, depth + 1)
    elif type(value).__module__.partition(".")[0] not in ("builtins", "numpy", "torch"):
        for item in getattr(value, "__dict__", {}).values():
            _collect(item, found, depth + 1)


# Inputs that a model may take -----------------------------------------------------------------------------------------

# Sizes to try where neither the caller nor the model says what it takes. A classifier that flattens its features takes
# one size only; that is why there are so many.
_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: tuple((n,) for n in (16000, 1024, 4096, 512, 256, 128, 100, 64, 32, 2048, 8000, 8192, 32000, 44100, 48000)),
    2: tuple((n, n) for n in (224, 32, 64, 28, 128, 256, 96, 299, 48, 16, 8, 384, 512, 112, 160, 192, 320, 448, 227)),
    3: (
        (16, 112, 112),
        (16, 224, 224),
        (32, 32, 32),
        (64, 64, 64),
        (16, 16, 16),
        (96, 96, 96),
        (8, 64, 64),
        (128, 128, 128),
        (32, 224, 224),
    ),
}
_SIZE_NAMES = ("image_size", "img_size", "in_size", "input_size", "resolution", "sample_size", "input_resolution")


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Inputs (on meta) that the model may take, the likeliest first."""
    conv = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    dtype = float_dtype(model)
    count = _required_inputs(model)
    config = _config_size(model)
    shapes: list[tuple[int, ...]] = []
    if config is not None:
        shapes.append(config)
    if conv is not None:
        dims = len(conv.kernel_size)
        if config is not None and len(config) == 3:
            shapes.append((conv.in_channels, *config[1:]))
        shapes += [(conv.in_channels, *size) for size in (*_sizes_of(model, dims), *_SIZES[dims])]
        if dims == 2 and conv.in_channels != 3:
            shapes.append((3, 224, 224))  # the first conv registered need not be the first one called
    for shape in dict.fromkeys(shapes):
        yield Inputs(tuple(torch.empty(2, *shape, dtype=dtype, device="meta") for _ in range(count)))
    if conv is not None and len(conv.kernel_size) == 2 and count == 1:  # detection models take a list of images
        yield Inputs(([torch.empty(conv.in_channels, 320, 320, dtype=dtype, device="meta")],))


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating parameters: of the first, where they differ."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _config_size(model: nn.Module) -> tuple[int, ...] | None:
    """The input size in the model's own config, where it has one (timm)."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = vars(model).get(name)
        if isinstance(config, dict) and isinstance(config.get("input_size"), (tuple, list)):
            return tuple(config["input_size"])
    return None


def _sizes_of(model: nn.Module, dims: int) -> Iterator[tuple[int, ...]]:
    """Sizes that the model, its config or one of its direct children keeps as an attribute."""
    for module in (model, *model.children()):
        for holder in (vars(module), vars(module).get("config"), vars(module).get("cfg"), vars(module).get("hparams")):
            for name in _SIZE_NAMES:
                size = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
                if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 100_000:
                    yield (size,) * dims
                elif isinstance(size, (tuple, list)) and len(size) >= dims and all(type(n) is int for n in size):
                    yield tuple(size[-dims:])


def _required_inputs(model: nn.Module) -> int:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


# Shapes as plain data -------------------------------------------------------------------------------------------------


def describe(inputs: Inputs, model: nn.Module) -> Any:
    """The inputs of a model as plain data, fit for JSON, with the shape and dtype of each tensor and the model's own dtype; None
    if they hold anything that can't be written that way."""
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
    name = f"{type(value).__module__}:{type(value).__qualname__}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": name, "fields": {f: _described(v) for f, v in zip(value._fields, value, strict=True)}}
    if dataclasses.is_dataclass(value) and all(f.init for f in dataclasses.fields(value)):
        fields = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": name, "fields": fields}
    raise TypeError(f"a {type(value).__name__} can't be written as plain data")


def described_inputs(description: Any, model: nn.Module) -> Inputs | None:
    """The inputs (on meta) that ``describe`` wrote, in the dtype that the model has by now; None if there is no description.
    Nothing of a class is called: its objects get their fields.

    Raises:
        ValueError: it is no such description, or needs a class that the program has not imported.
    """
    if description is None:
        return None
    try:
        args, kwargs = description["args"], description["kwargs"]
        if not (isinstance(args, list) and isinstance(kwargs, dict)):
            raise ValueError("not a description of inputs: args must be a list and kwargs a dict")
        now = _DTypes(_dtype(description["dtype"]) if "dtype" in description else None, float_dtype(model))
        return Inputs(tuple(_restored(a, now) for a in args), {k: _restored(v, now) for k, v in kwargs.items()})
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a description of inputs: {error!r}") from error


@dataclass(frozen=True)
class _DTypes:
    """From the dtypes of a network's inputs to those of its inputs after a cast: what had the network's own (None: all that is
    floating) has its new one."""

    before: torch.dtype | None
    now: torch.dtype

    def of(self, dtype: torch.dtype) -> torch.dtype:
        return self.now if dtype.is_floating_point and self.before in (None, dtype) else dtype


def in_dtype_of(model: nn.Module, inputs: Inputs, before: torch.dtype | None) -> Inputs:
    """Inputs of a network whose dtype was ``before`` for one like it of another dtype."""
    dtypes = _DTypes(before, float_dtype(model))
    return copied(inputs, lambda tensor: tensor.to(dtypes.of(tensor.dtype)))


def _restored(value: Any, now: _DTypes) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise TypeError("a list that is not marked as one")
        return value
    if "tensor" in value:
        return torch.empty(value["tensor"], dtype=now.of(_dtype(value["dtype"])), device="meta")
    if "list" in value:
        return [_restored(v, now) for v in value["list"]]
    if "tuple" in value:
        return tuple(_restored(v, now) for v in value["tuple"])
    if "dict" in value:
        return {k: _restored(v, now) for k, v in value["dict"].items()}
    return _object(_class(value["class"]), {k: _restored(v, now) for k, v in value["fields"].items()})


def _dtype(name: str) -> torch.dtype:
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype


def _class(name: str) -> type:
    """A class by its module and name. A file must not make us run anything: what is not imported stays so, and modules that
    import a name when it is asked for are not asked."""
    module, _, qualname = name.partition(":")
    if module not in sys.modules:
        raise ValueError(f"the inputs are of class {qualname} of {module}, which is not imported: import it first")
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = vars(found)[part]
    if not (isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))):
        raise ValueError(f"the inputs are of class {name}, which is neither a dataclass nor a namedtuple")
    return found


def _object(cls: type, values: dict[str, Any]) -> Any:
    """A namedtuple or dataclass with these fields. Its constructor may do anything with them, so it is not called; what it had
    made of them was saved."""
    if issubclass(cls, tuple):
        if inspect.getattr_static(cls, "_fields", None) != tuple(values):
            raise TypeError(f"{cls.__qualname__} has other fields than {', '.join(values)}")
        return tuple.__new__(cls, values.values())
    if {f.name for f in dataclasses.fields(cast(Any, cls))} != values.keys():
        raise TypeError(f"{cls.__qualname__} has other fields than {', '.join(values)}")
    made = object.__new__(cls)
    if hasattr(made, "__dict__"):
        vars(made).update(values)
    else:
        for name, value in values.items():
            object.__setattr__(made, name, value)
    return made
