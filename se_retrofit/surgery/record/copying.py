"""Copies of a model that share nothing with it: on the meta device, on the CPU, or where it is.

``copy.deepcopy`` is asked for the copy. What it would get wrong is put right: a tensor comes out where it is wanted
(``Tensor.__deepcopy__`` can be listened to), a module whose ``__deepcopy__`` returns itself is copied all the same, and
weak references to a module of the model point to its copy.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.overrides import TorchFunctionMode

from ...errors import RetrofitError
from .isolation import forked_randomness

__all__ = ["copied", "has_values", "in_mode", "mode_of", "on_cpu", "on_meta"]

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Convert = Callable[[Tensor], Tensor]


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype without data."""
    try:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    except (RuntimeError, NotImplementedError):  # no strides: a sparse tensor
        return torch.empty(tensor.size(), dtype=tensor.dtype, device="meta")


def on_cpu(tensor: Tensor) -> Tensor:
    """The same values on the CPU; a meta tensor has none, and gets zeros."""
    if tensor.device.type == "meta":
        return torch.zeros(tensor.size(), dtype=tensor.dtype)
    return tensor.detach().to("cpu", copy=True)


def in_mode(model: M, training: bool) -> M:
    """The model, in train or in eval mode. A class of the user's may have a ``train`` of its own that returns nothing."""
    model.train(training)
    return model


def mode_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The mode in which tensors like this one are made: a fake tensor's own, on whose devices nothing is allocated."""
    return maybe_get_fake_mode(tensor) or contextlib.nullcontext()


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values; a meta or fake one has a shape and a dtype alone."""
    return not tensor.is_meta and maybe_get_fake_mode(tensor) is None


class _Converted(TorchFunctionMode):
    """While it is active, ``copy.deepcopy`` gives converted tensors, wherever in an object they are."""

    def __init__(self, convert: Convert) -> None:
        super().__init__()
        self.convert = convert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) in memo:
                return memo[id(tensor)]
            with torch._C.DisableTorchFunction():
                return _converted(tensor, memo, self.convert)
        if func is Tensor.clone:  # a Parameter's own __deepcopy__ clones its data
            with torch._C.DisableTorchFunction():
                return self.convert(args[0])
        return func(*args, **(kwargs or {}))


def _converted(tensor: Tensor, memo: dict[int, Any], convert: Convert) -> Tensor:
    new = convert(tensor)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    elif tensor.requires_grad and (new.is_floating_point() or new.is_complex()):
        new.requires_grad_()
    memo[id(tensor)] = new
    return new


def copied(value: T, convert: Convert | None = None, *, independent: bool = False) -> T:
    """A deep copy of a model or of its inputs.

    Args:
        value: what to copy.
        convert: what becomes of each tensor in it; None clones.
        independent: copy what hooks and functions on instances hold, too, and share what can't be copied (a lock,
            an open file) instead of failing: for a copy that is run once and thrown away.

    Raises:
        RetrofitError: something in it can't be copied.
    """
    for tensor in value.parameters() if isinstance(value, nn.Module) else ():
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise RetrofitError(
                "the model has lazy parameters, whose shapes are not known yet: call the model once, then retrofit it"
            )
    if convert is None:
        # a __deepcopy__ may build anew, and so draw weights; tensors made in inference mode could never be trained
        with forked_randomness(), torch.inference_mode(False):
            return _copied(value, None, independent)
    with torch.utils._python_dispatch._disable_current_modes(), _Converted(convert):
        return _copied(value, convert, independent)


def _copied(value: T, convert: Convert | None, independent: bool) -> T:
    modules = list(value.modules()) if isinstance(value, nn.Module) else []
    if (
        modules
        and all(map(_is_plain, {type(m) for m in modules}))
        and not any("__deepcopy__" in vars(m) for m in modules)
    ):
        forced = modules
    else:
        forced = [m for m in modules if _answers_anything(m) or (independent and _copies_itself(m))]
    given = {id(m): object.__new__(type(m)) for m in forced}  # what the copy is to hold in the place of an object
    try:
        result, memo = _deep_copy(value, modules, given, convert, independent, forced)
    except Exception as error:
        if not independent:
            raise RetrofitError(
                f"the model ({type(value).__name__}) can't be copied: copy.deepcopy raised {type(error).__name__}: {error}. "
                "Retrofit it in place: add_se(model, ..., inplace=True)"
            ) from error
        given.update(_what_cannot_be_copied(modules))
        result, memo = _deep_copy(value, modules, given, convert, independent, forced)
    shared = _shared(modules, result)
    if shared:
        forced += shared
        given.update({id(module): object.__new__(type(module)) for module in shared})
        result, memo = _deep_copy(value, modules, given, convert, independent, forced)
    _point_weak_references(modules, memo)
    if not independent:
        _point_functions(modules, memo)
    return result


def _deep_copy(
    value: T, modules: list[nn.Module], given: dict[int, Any], convert: Convert | None, independent: bool,
    forced: list[nn.Module],
) -> tuple[T, dict[int, Any]]:  # fmt: skip
    memo = dict(given)
    for mode in {maybe_get_fake_mode(tensor) for module in modules for tensor in module.parameters(recurse=False)}:
        memo[id(mode)] = mode  # the copy of a fake tensor is of the same mode
    if convert is None:
        memo.update(_recomputed(modules))
    functions = _with_empty_cells(modules, memo) if independent else []
    result = copy.deepcopy(value, memo)
    for module in reversed(forced):  # copied by us, whatever its class says; children before their parents
        new = memo[id(module)]
        vars(new).clear()
        state = {k: _copy_of(v, memo, convert) for k, v in vars(module).items()}
        if forced is modules:
            new.__setstate__(state)
        else:
            vars(new).update(state)
    for original, new in functions:
        for before, after in zip(original.__closure__, new.__closure__, strict=True):
            after.cell_contents = _copied_or_shared(before, memo)
    return result, memo


def _recomputed(modules: list[nn.Module]) -> dict[int, Tensor]:
    """Copies of tensors with a history, which ``copy.deepcopy`` refuses, on modules whose hooks compute them anew before each
    forward: weights under ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune``."""
    return {
        id(value): value.detach().clone()
        for module in modules
        if module._forward_pre_hooks
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


_ATOMS = (int, float, bool, str, type(None))


def _copy_of(value: Any, memo: dict[int, Any], convert: Convert | None) -> Any:
    """``copy.deepcopy`` of a module's attributes, with shortcuts for the usual ones: a module has a dozen containers of
    hooks, most of them empty, and ``copy.deepcopy`` takes each apart."""
    cls = type(value)
    if cls in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if cls is dict:
        new: Any = {}
        memo[id(value)] = new
        for key, item in value.items():
            new[_copy_of(key, memo, convert)] = _copy_of(item, memo, convert)
        return new
    if cls in (OrderedDict, set) and not value:
        new = memo[id(value)] = cls()
        return new
    if convert is not None and cls in (Tensor, nn.Parameter):
        with torch._C.DisableTorchFunction():
            return _converted(value, memo, convert)
    return copy.deepcopy(value, memo)


def _is_plain(cls: type) -> bool:
    """Whether ``copy.deepcopy`` makes a bare instance of a class of modules and copies what stands on it."""
    own: Any = cls
    return (
        cls not in copyreg.dispatch_table
        and own.__new__ is object.__new__
        and own.__reduce_ex__ is object.__reduce_ex__
        and own.__reduce__ is object.__reduce__
        and own.__getstate__ is nn.Module.__getstate__
        and own.__setstate__.__module__.startswith("torch.nn.")
        and own.__getattr__ is nn.Module.__getattr__
        and own.__getattribute__ is object.__getattribute__
        and not any(hasattr(cls, name) for name in ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__"))
        and not copyreg._slotnames(cls)  # type: ignore[attr-defined]
    )


def _shared(modules: list[nn.Module], result: Any) -> list[nn.Module]:
    """The modules that the copy has in common with the original."""
    if not modules:
        return []
    own = {id(m) for m in modules}
    return [m for m in result.modules() if id(m) in own]


def _copies_itself(module: nn.Module) -> bool:
    """Whether a module's class has a way of its own to be copied: with a constructor, say, that makes tensors with values."""
    if isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        return False
    names = {
        name
        for cls in type(module).__mro__
        if cls.__module__.partition(".")[0] not in ("torch", "builtins")
        for name in vars(cls)
    }
    return type(module) in copyreg.dispatch_table or hasattr(type(module), "__deepcopy__") or bool(names & _COPYING)


_COPYING = {
    "__new__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__setstate__",
}  # fmt: skip


def _answers_anything(module: nn.Module) -> bool:
    """Whether a module claims to have any attribute, ``__deepcopy__`` among them."""
    own = any("__deepcopy__" in vars(cls) for cls in type(module).__mro__)
    return not own and getattr(module, "__deepcopy__", None) is not None


def _values(module: nn.Module) -> Iterator[Any]:
    """What stands on an instance beside its children, parameters and buffers."""
    for name, value in vars(module).items():
        if name in ("_modules", "_parameters", "_buffers"):
            continue
        yield value
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value


def _with_empty_cells(modules: list[nn.Module], memo: dict[int, Any]) -> list[tuple[Any, Any]]:
    """Functions on instances (hooks above all) with cells of their own, which are filled when the copy is there."""
    made = []
    for module in modules:
        for value in _values(module):
            if isinstance(value, types.FunctionType) and value.__closure__ and id(value) not in memo:
                cells = tuple(types.CellType() for _ in value.__closure__)
                new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
                new.__kwdefaults__ = value.__kwdefaults__
                new.__dict__.update(vars(value))
                memo[id(value)] = new
                made.append((value, new))
    return made


def _copied_or_shared(cell: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(cell.cell_contents, memo)
    except Exception:  # what can't be copied is shared
        return cell.cell_contents


def _what_cannot_be_copied(modules: list[nn.Module]) -> dict[int, Any]:
    shared: dict[int, Any] = {}
    for module in modules:
        for value in _values(module):
            if not isinstance(value, (nn.Module, Tensor)):
                try:
                    copy.deepcopy(value, {id(m): m for m in modules})
                except Exception:
                    shared[id(value)] = value
    return shared


def _point_weak_references(modules: list[nn.Module], memo: dict[int, Any]) -> None:
    for module in modules:
        new = memo.get(id(module))
        if new is None:
            continue
        for name, value in list(vars(new).items()):
            if isinstance(value, weakref.ref):
                target = memo.get(id(value()))
                if isinstance(target, nn.Module):
                    vars(new)[name] = weakref.ref(target)


def _point_functions(modules: list[nn.Module], memo: dict[int, Any]) -> None:
    """Functions on instances (a ``forward`` that was set there, a lambda made in ``__init__``) work on the copy's
    modules; ``copy.deepcopy`` shares them, and with them the original's modules."""
    for module in modules:
        new = memo.get(id(module))
        if new is None or new is module:
            continue
        for name, value in list(vars(new).items()):
            if isinstance(value, types.FunctionType):
                vars(new)[name] = _of_copy(value, memo, 0)


def _of_copy(value: Any, memo: dict[int, Any], depth: int) -> Any:
    """What stands for a module, or for a function that holds one, in a copy; anything else stands for itself."""
    if isinstance(value, (nn.Module, Tensor)):
        return memo.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = _of_copy(value.__self__, memo, depth)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if not isinstance(value, types.FunctionType) or not value.__closure__ or depth > 8:
        return value
    cells = []
    for cell in value.__closure__:
        try:
            content = _of_copy(cell.cell_contents, memo, depth + 1)
        except ValueError:  # an empty cell
            cells.append(cell)
            continue
        cells.append(cell if content is cell.cell_contents else types.CellType(content))
    if all(a is b for a, b in zip(cells, value.__closure__, strict=True)):
        return value
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    new.__kwdefaults__, new.__qualname__, new.__doc__ = value.__kwdefaults__, value.__qualname__, value.__doc__
    new.__dict__.update(vars(value))
    return new
