"""The recorder: a copy of the model is run on real tensors, on the meta device as a rule. Hooks tell which module is called,
by whom; ``torch.utils._python_dispatch`` tells each operation of ATen. Nothing is symbolic: Python runs as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import Inserted
from .inputs import Inputs, tensors_in
from .isolation import PrivateRandomness
from .meta import MetaOperations, all_on_meta
from .methods import methods_of
from .record import Call, Op, Record, Where
from .roles import module_role, role_of

__all__ = ["NeedsValues", "record"]


class NeedsValues(RuntimeError):
    """The run asks for values, which meta tensors do not have."""


# Whose source -------------------------------------------------------------------------------------------------------


_CALL = nn.Module._call_impl.__code__


def _frames(call: Call, skip: int) -> Where:
    """The frames of a module's own methods that are running, out to its call; ``skip`` calls further in are passed over."""
    own = methods_of(type(call.module))
    found = []
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            if not skip:
                break
            skip -= 1
        elif not skip and code in own:
            name = own[code].self_name
            if name is not None and frame.f_locals.get(name, call.module) is call.module:
                found.append((code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


# The recorder ---------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    def __init__(self, result: Record, randomness: PrivateRandomness, on_meta: MetaOperations) -> None:
        super().__init__()
        self.result = result
        self.randomness = randomness
        self.on_meta = on_meta
        self.known: dict[int, Op] = {}
        self.kept: list[Tensor] = []  # ids are of living tensors
        self.by_storage: dict[int, list[Tensor]] = {}
        modules = list(result.model.named_modules())
        self.modules = [m for _, m in modules]
        self.paths = {id(m): path for path, m in modules}
        self.stale: dict[int, tuple[str, tuple[Op, ...]]] = {}  # tensors whose data was changed under another name
        self.later: dict[int, tuple[Any, ...]] = {}  # second outputs, operations once something takes them
        self.tensor_paths = {
            id(t): f"{path}.{name}" if path else name
            for own in ("_buffers", "_parameters")  # the name as a parameter counts, and of several names the first
            for path, module in reversed(modules)
            for name, t in reversed(getattr(module, own).items())
        }
        self.stack: list[Call] = []
        self.one: nn.Module | None = None  # the module being run that counts as one operation
        self.failed_in: str | None = None
        self.one_inputs: tuple[Op, ...] = ()
        self.around: nn.Module | None = None  # the retrofitted one whose SE is being run
        self.changed: dict[int, Tensor] = {}  # the tensors that it has changed, by id, and so kept alive
        self.needed_values: Exception | None = None

    # Calls of modules

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.one is not None:
            if isinstance(module, Inserted) and not isinstance(
                self.one, Inserted
            ):  # the one operation is retrofitted: SE comes after it
                self.add_module(self.one, args[0])
                self.around, self.one = self.one, module
                self.one_inputs, self.changed = (self.op_of(args[0]),), {}
            return
        given = [self.op_of(t) for t in tensors_in((args, kwargs))]
        if self.stack and module_role(module) is not None:
            self.one, self.one_inputs, self.changed = module, tuple(given), {}
            return
        parent = self.stack[-1] if self.stack else None
        call = Call(module, self.paths[id(module)], parent, len(self.result.ops), inputs=given)
        if parent is not None:
            parent.children.append(call)
            call.where = _frames(parent, 1)
        self.result.calls.append(call)
        self.stack.append(call)

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.one is not None:
            if self.one is module:
                if output is None:  # it raised
                    self.failed_in = self.paths[id(module)]
                self.one = None
                self.add_module(module, output)
                if self.around is not None:
                    self.one, self.around = self.around, None
                    self.one_inputs, self.changed = (self.op_of(output),), {}
            return
        if not any(call.module is module for call in self.stack):
            return
        while self.stack[-1].module is not module:  # calls that raised, which the model's code has caught
            self.stack.pop().end = len(self.result.ops)
        call = self.stack[-1]
        call.outputs = [self.op_of(t) for t in tensors_in(output)]
        self.stack.pop()
        call.end = len(self.result.ops)
        call.returned = call.outputs[0] if isinstance(output, Tensor) else None

    def add_module(self, module: nn.Module, output: Any) -> None:
        """The operation that a module is, one for each tensor that it returns."""
        call = self.stack[-1]
        where = _frames(call, 1)
        for tensor in tensors_in(output):
            before = self.op_of(tensor) if id(tensor) in self.known else None
            changed = id(tensor) in self.changed
            if before is not None and not changed and before in self.one_inputs:  # it returned what it was given
                call.passes.append((before, module, self.paths[id(module)]))
                continue
            recipe = getattr(type(module), "se_recipe", None)
            name = type(module).__name__ if recipe is None else recipe.base.__name__
            op = self.new_op(name, self.one_inputs, (), tensor, where)
            op.module, op.path, op.inplace = module, self.paths[id(module)], changed
            self.keep(tensor, op)
        if self.changed:
            self.change_aliases(tensors_in(output), self.changed.keys())

    # Operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        output = self.run(func, args, kwargs, given)
        if not self.stack:
            return output
        changes = func._schema.is_mutable
        if self.one is not None:
            if changes:
                self.changed.update((id(t), t) for t in _written(func, args, kwargs))
            return output
        if func is torch.ops.aten.detach.default:  # the same value; autograd does it to what it saves, too
            self.keep(output, self.op_of(args[0]))
            return output
        inputs = [] if _makes(func) else given
        operations = tuple(self.op_of(t) for t in inputs)
        written = _written(func, args, kwargs) if changes else []
        where = _frames(self.stack[-1], 0)
        name = func._schema.name.rpartition("::")[2]
        name = name[:-1] if changes and name.endswith("_") else name
        plain = tuple(None if isinstance(a, Tensor) else a for a in args)
        named = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
        if name == "copy" and len(operations) == 2:
            operations = operations[1:]
        outputs = tensors_in(output)
        for tensor in (outputs if role_of(name) == "part" else outputs[:1]) or written:
            op = self.new_op(name, operations, plain, tensor, where)
            op.target, op.kwargs, op.inplace = func, named, any(tensor is t for t in written)
            self.keep(tensor, op)
        for tensor in outputs[1:]:  # a norm's statistics, a pool's indices: hardly ever used
            if id(tensor) not in self.known:
                self.later[id(tensor)] = (tensor, name, operations, plain)
        if written:
            for tensor in written:
                if not any(tensor is t for t in outputs) and outputs:
                    self.keep(tensor, self.new_op(name, operations, plain, tensor, where))
            self.change_aliases(written, {id(t) for t in written})
        return output

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        on_meta = [t.is_meta for t in given]
        if any(on_meta):
            if not all(on_meta):
                if func._schema.is_mutable and not all(t.is_meta for t in _written(func, args, kwargs)):
                    raise self.needs(NeedsValues("a tensor with values is changed by one without"))
                args, kwargs = all_on_meta(args), all_on_meta(kwargs)
            try:
                return self.on_meta.run(func, args, kwargs)
            except Exception as error:
                raise self.needs(error) from None
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self.randomness.draw(func, args, kwargs)
        return func(*args, **kwargs)

    def needs(self, error: Exception) -> Exception:
        """Note that values were asked for, even if the model's code catches the error; other errors it would meet with values, too."""
        if isinstance(error, (NeedsValues, NotImplementedError)) or "meta" in str(error).lower():
            self.needed_values = self.needed_values or error
        return error

    # Values

    def new_op(self, name: str, inputs: tuple[Op, ...], args: tuple[Any, ...], tensor: Tensor, where: Where) -> Op:
        ops = self.result.ops
        op = Op(len(ops), name, inputs, args, tensor.shape, tensor.dtype, self.stack[-1], where=where)
        ops.append(op)
        return op

    def keep(self, tensor: Tensor, op: Op) -> None:
        if id(tensor) not in self.known:
            self.kept.append(tensor)
            key = _storage(tensor)
            if key:
                self.by_storage.setdefault(key, []).append(tensor)
        self.known[id(tensor)] = op
        self.stale.pop(id(tensor), None)

    def op_of(self, tensor: Tensor) -> Op:
        """The operation that made a tensor; a tensor that came from elsewhere is one, too."""
        found = self.known.get(id(tensor))
        if id(tensor) in self.stale:
            name, inputs = self.stale.pop(id(tensor))
            found = self.known[id(tensor)] = self.new_op(name, inputs, (), tensor, ())
        if found is None:
            found = self.alias_of(tensor)
            if found is None and id(tensor) in self.later:
                _, name, inputs, args = self.later[id(tensor)]
                found = self.new_op(name, inputs, args, tensor, ())
            elif found is None:
                call = self.stack[-1] if self.stack else Call(self.result.model, "", None, 0)
                name = "input" if not self.stack else "param"
                found = Op(len(self.result.ops), name, (), (), tensor.shape, tensor.dtype, call)
                found.path = self.tensor_paths.get(id(tensor))
                self.result.ops.append(found)
            self.keep(tensor, found)
        return found

    def alias_of(self, tensor: Tensor) -> Op | None:
        """The last operation whose output is the same data, under another name (``x.data``, what ``autograd`` makes)."""
        for other in reversed(self.by_storage.get(_storage(tensor), [])):
            if all(of(other) == of(tensor) for of in (Tensor.size, Tensor.stride, Tensor.storage_offset)):
                return self.op_of(other)
        return None

    def change_aliases(self, written: list[Tensor], changed: Collection[int]) -> None:
        """What shares its data with a tensor that was written to has changed as well."""
        for tensor in written:
            source = self.known.get(id(tensor))
            if source is None:
                continue
            for other in self.by_storage.get(_storage(tensor), []):
                before = self.known[id(other)]
                if other is tensor or id(other) in changed or before is source or before.name == "param":
                    continue
                whole = other.numel() == tensor.numel()
                self.stale[id(other)] = ("alias", (source,)) if whole else ("write", (before, source))


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor, a functorch wrapper
        return 0


_WRITTEN: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    if func not in _WRITTEN:
        _WRITTEN[func] = tuple(
            (i, a.name)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in _WRITTEN[func]]
    return [t for t in tensors_in(values) if not isinstance(t, nn.Parameter)]


_MAKES: dict[Any, bool] = {}


def _makes(func: Any) -> bool:
    """Whether an operation makes a tensor anew and takes at most the shape of another (``zeros_like``)."""
    if func not in _MAKES:
        name = func._schema.name.rpartition("::")[2]
        _MAKES[func] = name.endswith("_like") or name.startswith("new_") or name in ("bernoulli", "rand", "randn")
    return _MAKES[func]


def record(model: nn.Module, inputs: Inputs, on_meta: MetaOperations | None = None) -> Record:
    """Run a model once and record it. The model is a copy that the caller made, in the mode in which it is to run.

    Args:
        model, inputs: on the meta device, or on the CPU.
        on_meta: what earlier recordings have learned about operations on the meta device.

    Returns:
        The record; where the run raised, of what came before, with the reason in ``broke_off``.

    Raises:
        NeedsValues: the model and its inputs are on the meta device, and the run asks for values.
    """
    result = Record(model, inputs)
    with PrivateRandomness(model) as randomness:
        recorder = _Recorder(result, randomness, on_meta or MetaOperations())
        # a script module takes no such hooks; its operations are its caller's
        hooked = [m for m in recorder.modules if not isinstance(m, torch.jit.ScriptModule)]
        for module in hooked:  # as register_forward_hook does it, without an object for each of thousands of hooks
            module._forward_pre_hooks[_HOOK] = recorder.begin
            module._forward_hooks[_HOOK] = recorder.end
            for flags in _flags_of_hooks(module):
                flags[_HOOK] = True
        args, kwargs = inputs.args, inputs.kwargs
        try:
            with recorder:
                model(*args, **kwargs)
        except Exception as error:
            if recorder.needed_values is None and _asks_for_values(error, inputs):
                recorder.needed_values = error
            result.broke_in = recorder.failed_in
            result.broke_off = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        finally:
            for module in hooked:
                del module._forward_pre_hooks[_HOOK], module._forward_hooks[_HOOK]
                for flags in _flags_of_hooks(module):
                    del flags[_HOOK]
            for call in result.calls:
                call.end = call.end or len(result.ops)
            result.edges = [op.inputs for op in result.ops]
    if recorder.needed_values is not None:
        raise NeedsValues(str(recorder.needed_values)) from recorder.needed_values
    return result


_HOOK: Any = "recorder"  # where PyTorch has a running number


def _flags_of_hooks(module: nn.Module) -> tuple[dict[int, bool], ...]:
    """Where PyTorch notes that a hook takes keyword arguments, and that it is called after an error, too."""
    return (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )


def _asks_for_values(error: Exception, inputs: Inputs) -> bool:
    on_meta = any(t.device.type == "meta" for t in tensors_in((inputs.args, inputs.kwargs)))
    return on_meta and "meta" in str(error).lower()
