"""Copies of a model that share nothing with it: on the meta device, on the CPU, or on its own device.

The modules of the copy are created first, and passed to ``copy.deepcopy`` as its memo. Only modules whose class defines
how it is copied are left to ``copy.deepcopy``.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import RetrofitError
from .isolation import forked_randomness
from .methods import remade

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Convert = Callable[[Tensor], Tensor]


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and dtype without data."""
    try:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    except (RuntimeError, NotImplementedError):  # no strides: a sparse tensor
        return torch.empty(tensor.size(), dtype=tensor.dtype, device="meta")


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the same values on the CPU; a meta tensor has none, and becomes zeros."""
    if tensor.device.type == "meta":
        return torch.zeros(tensor.size(), dtype=tensor.dtype)
    return tensor.detach().to("cpu", copy=True)


def on_its_device(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def in_mode(model: M, training: bool) -> M:
    """Set the model to train or eval mode, and return it. A user's class may have a ``train`` that returns nothing."""
    model.train(training)
    return model


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of each module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def mode_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the mode in which tensors like this one are created: a fake tensor's own, which allocates nothing."""
    return maybe_get_fake_mode(tensor) or contextlib.nullcontext()


def check_whole(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise an error if a named tensor is distributed over processes: reading such a tensor as a whole can crash Python."""
    for name, tensor in tensors:
        if type(tensor).__name__ == "DTensor":  # whose module takes seconds to import
            raise RetrofitError(
                f"{name} is spread over processes (a DTensor): give the whole network, as it was before fully_shard or "
                "distribute_module; what it has learned since, load into it from get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True))"
            )


def check_values(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise an error if a named tensor has no values, only a shape and a dtype, or is distributed over processes."""
    tensors = list(tensors)
    check_whole(tensors)
    for name, tensor in tensors:
        if tensor.is_meta or maybe_get_fake_mode(tensor) is not None:
            kind = "on the meta device" if tensor.is_meta else "a fake tensor"
            raise RetrofitError(f"{name} is {kind} and has no values; load weights first")


def copied(value: T, convert: Convert | None = None, *, independent: bool = False) -> T:
    """Return a deep copy of a model or of its inputs.

    Args:
        value: the object to copy.
        convert: function that converts each tensor in it; None clones.
        independent: also copy what hooks and functions on instances hold, and share what can't be copied (a lock,
            an open file) instead of failing: for a copy that is run once and discarded.
    """
    modules = list(value.modules()) if isinstance(value, nn.Module) else []
    if any(is_lazy(tensor) for module in modules for tensor in module.parameters(recurse=False)):
        raise RetrofitError("the model has lazy parameters, without shapes yet: call the model once, then retrofit it")
    if isinstance(value, nn.Module):
        check_whole((*value.named_parameters(), *value.named_buffers()))
    with contextlib.ExitStack() as stack:
        if convert is None:
            # a __deepcopy__ may rebuild modules, drawing weights; tensors from inference mode could never be trained
            stack.enter_context(forked_randomness())
            stack.enter_context(torch.inference_mode(False))
        else:
            stack.enter_context(_disable_current_modes())
            stack.enter_context(_Converted(convert))
        try:
            result = _Copy(modules, convert, independent).of(value)
            # some returned themselves
            if isinstance(result, nn.Module) and not set(modules).isdisjoint(result.modules()):
                result = _Copy(modules, convert, independent, ask=False).of(value)
        except Exception as error:
            raise RetrofitError(
                f"the model ({type(value).__name__}) can't be copied: copy.deepcopy raised {type(error).__name__}: {error}. "
                "Retrofit it in place: add_se(model, ..., inplace=True)"
            ) from error
    return result


class _Converted(TorchFunctionMode):
    """While it is active, ``copy.deepcopy`` returns converted tensors, wherever they are in an object."""

    def __init__(self, convert: Convert) -> None:
        super().__init__()
        self.convert = convert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = _converted(tensor, self.convert)
            return memo[id(tensor)]
        if func is Tensor.clone:  # a Parameter's own __deepcopy__ clones its data
            return self.convert(args[0])
        return func(*args, **(kwargs or {}))


def _converted(tensor: Tensor, convert: Convert) -> Tensor:
    with torch._C.DisableTorchFunction():
        new = convert(tensor)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(new, tensor.requires_grad)
        return new.requires_grad_(tensor.requires_grad and (new.is_floating_point() or new.is_complex()))


_ATOMS = (int, float, bool, str, type(None))
_CONTAINERS = (dict, OrderedDict, set)  # a module has a dozen, most of them empty; copy.deepcopy takes each apart


class _Copy:
    """A copy under construction. Its memo holds the counterparts of the original's objects, by their ids."""

    def __init__(self, modules: list[nn.Module], convert: Convert | None, independent: bool, ask: bool = True) -> None:
        self.independent = independent
        filled = [module for module in modules if not _copies_itself(module, independent or not ask)]
        self.memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in filled}
        self.own = set(map(id, modules))
        for module in modules:
            self.tensors(module, convert)
        for module in reversed(filled):  # children first: a parent that copies itself may need them
            vars(self.memo[id(module)]).update({name: self.of(value) for name, value in vars(module).items()})

    def tensors(self, module: nn.Module, convert: Convert | None) -> None:
        found: list[Any] = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if module._forward_pre_hooks:  # weight_norm, spectral_norm and prune recompute weights before each forward
            found += [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in found:
            self.own.add(id(tensor))
            if convert is not None:
                if id(tensor) not in self.memo:  # tied parameters are there already
                    self.memo[id(tensor)] = _converted(tensor, convert)
                continue
            mode = maybe_get_fake_mode(tensor)
            self.memo[id(mode)] = mode  # the copy of a fake tensor is of the same mode
            if not tensor.is_leaf:  # which copy.deepcopy refuses
                self.memo[id(tensor)] = tensor.detach().clone()

    def of(self, value: Any) -> Any:
        """Return the counterpart of an object in the copy."""
        cls = type(value)
        if cls in _ATOMS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if cls in _CONTAINERS and (cls is not OrderedDict or not vars(value)):
            new = self.memo[id(value)] = cls()
            if value:
                items = map(self.of, value) if cls is set else ((self.of(k), self.of(v)) for k, v in value.items())
                new.update(items)
            return new
        if cls is types.FunctionType:
            return self.function(value)
        if cls is weakref.ref and id(value()) in self.own:
            return weakref.ref(self.of(value()))
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            if not self.independent:
                raise
            self.memo[id(value)] = value
            return value

    def function(self, function: types.FunctionType) -> types.FunctionType:
        """Copy a hook or a function set on an instance, which ``copy.deepcopy`` shares, with what its cells hold."""
        cells = tuple(map(self.cell, function.__closure__ or ()))
        if all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True)):
            return function
        return remade(function, function.__code__, cells)

    def cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self.memo:
            try:
                content = cell.cell_contents
            except ValueError:  # it is empty
                return cell
            new = self.memo[id(cell)] = types.CellType()
            new.cell_contents = self.held(content)
            if new.cell_contents is content and not self.independent:
                self.memo[id(cell)] = cell
        found: types.CellType = self.memo[id(cell)]
        return found

    def held(self, value: Any) -> Any:
        """Return the counterpart of an object that a function holds; only the model's modules and tensors have one."""
        if self.independent or id(value) in self.own or isinstance(value, types.FunctionType):
            return self.of(value)
        if isinstance(value, types.MethodType):
            owner = self.held(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        return value


def _copies_itself(module: nn.Module, independent: bool) -> bool:
    """Return whether copying is left to the module's class: if the module has more than its ``__dict__`` (a graph, a
    script, slots, a list), or if the class defines it, unless that could create tensors with values, or share some."""
    cls = type(module)
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)) or cls.__basicsize__ > nn.Module.__basicsize__:
        return True
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    return not independent and (cls in copyreg.dispatch_table or any(_COPYING & vars(base).keys() for base in own))


_COPYING = {
    "__deepcopy__", "__new__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__getstate__",
    "__setstate__",
}  # fmt: skip
