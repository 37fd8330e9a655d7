"""The recorder: a copy of the model is run on real tensors, usually on the meta device. Hooks record which module calls
which; ``torch.utils._python_dispatch`` records each ATen operation. Nothing is symbolic: Python runs as it is.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ...attention import Inserted
from .copying import copied, on_meta
from .graph import Call, Op, Record, Where, rewritten, tensor_of
from .inputs import Inputs, tensors_in
from .isolation import forked_randomness
from .meta import MetaOperations
from .methods import methods_of
from .roles import module_role, role_of
from .values import Values, makes, written_by


class NeedsValues(RuntimeError):
    """Raised if the run needs values, which meta tensors don't have."""


_CALL = nn.Module._call_impl.__code__


def _frames(call: Call, skip: int) -> Where:
    """Return the running frames of a module's own methods, out to its call, ignoring the innermost ``skip`` calls."""
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


@dataclass(eq=False)
class _Single:
    """The call of a module that counts as one operation."""

    module: nn.Module
    arguments: tuple[Any, Any]
    inputs: tuple[Op, ...]
    changed: dict[int, Tensor] = field(default_factory=dict)  # the tensors that it has changed, by id, kept alive
    activated: bool = False  # whether the last layer in it was an activation


class _Recorder(TorchDispatchMode):
    def __init__(self, result: Record, on_meta: MetaOperations, traced: bool) -> None:
        super().__init__()
        self.result = result
        self.on_meta = on_meta
        self.traced = traced
        self.on_gpu = result.inputs.tensors[0].device.type not in ("cpu", "meta")
        modules = list(result.model.named_modules())
        self.modules = [m for _, m in modules]
        self.paths = {id(m): path for path, m in modules}
        self.values = Values(result.model, self.given, self.changed_elsewhere)
        self.stack: list[Call] = []
        self.singles: list[_Single] = []  # a module that counts as one operation, and the SE inserted into it
        self.failed_in: str | None = None
        self.needed_values: Exception | None = None

    # Calls of modules

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        op_of = self.values.op_of
        if self.singles:
            around = self.singles[-1]
            if isinstance(module, Inserted) and not isinstance(around.module, Inserted):
                self.add_module(around, args[0])  # the operation is retrofitted: SE comes after it
                self.singles.append(_Single(module, (args, kwargs), (op_of(args[0]),)))
            return
        given = [op_of(t) for t in tensors_in((args, kwargs))]
        if self.stack and module_role(module) is not None:
            self.singles.append(_Single(module, (args, kwargs), tuple(given)))
            return
        parent = self.stack[-1] if self.stack else None
        call = Call(module, self.paths[id(module)], parent, len(self.result.ops), inputs=given)
        if parent is not None:
            parent.children.append(call)
            call.where = _frames(parent, 1) if self.traced else ()
        self.result.calls.append(call)
        self.stack.append(call)

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.singles:
            if self.singles[-1].module is module:
                self.end_single(self.singles.pop(), output)
            return
        if not any(call.module is module for call in self.stack):
            return
        while self.stack[-1].module is not module:  # calls that raised an error, which the model's code caught
            self.stack.pop().end = len(self.result.ops)
        call = self.stack[-1]
        call.outputs = [self.values.op_of(t) for t in tensors_in(output)]
        if len(self.stack) == 1 and self.traced:
            self.result.graph.output(self.nodes_in(output))
        self.stack.pop()
        call.end = len(self.result.ops)
        call.returned = call.outputs[0] if isinstance(output, Tensor) else None

    def end_single(self, single: _Single, output: Any) -> None:
        if output is None:  # it raised
            self.failed_in = self.paths[id(single.module)]
            return
        self.add_module(single, output)
        if self.singles:  # the rest of the module takes what SE has scaled
            around = self.singles.pop()
            self.singles.append(_Single(around.module, ((output,), {}), (self.values.op_of(output),)))

    def add_module(self, single: _Single, output: Any) -> None:
        """Add the operation for a module, one for each tensor that it returns."""
        module, path = single.module, self.paths[id(single.module)]
        call = self.stack[-1]
        where = _frames(call, 1) if self.traced else ()
        recipe = getattr(type(module), "se_recipe", None)
        name = type(module).__name__ if recipe is None else recipe.base.__name__
        whole: fx.Node | None = None
        for index, tensor in enumerate(tensors_in(output)):
            before = self.values.op_of(tensor) if self.values.known(tensor) is not None else None
            changed = id(tensor) in single.changed
            if before is not None and not changed and before in single.inputs:  # it returned its input
                call.passes.append((before, module, path))
                continue
            if whole is None and self.traced:
                args, kwargs = map(self.nodes_in, single.arguments)
                whole = self.result.graph.create_node("call_module", path, args, kwargs)
                whole.meta.update(call=call, where=where)
            op = self.new_op(name, single.inputs, tensor, self.part_of(whole, output, index), where=where)
            op.module, op.path, op.inplace, op.activated = module, path, changed, single.activated
            self.values.keep(tensor, op)
        if single.changed:
            self.values.change_aliases(tensors_in(output), single.changed.keys())

    # Operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        output = self.run(func, args, kwargs, given)
        if not self.stack:
            return output
        if self.singles:
            if func._schema.is_mutable:
                self.singles[-1].changed.update((id(t), t) for t in written_by(func, args, kwargs))
            role = role_of(func._schema.name.rpartition("::")[2].rstrip("_"))
            if role in ("conv", "norm", "act") and isinstance(output, Tensor) and output.dim() > 2:
                self.singles[-1].activated = role == "act"  # an observer clamps scales, which have no space
        elif func is torch.ops.aten.detach.default:  # the same value; autograd does it to what it saves, too
            self.values.keep(output, self.values.op_of(args[0]))
        else:
            self.add_operation(func, args, kwargs, given, output)
        return output

    def add_operation(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], output: Any) -> None:
        inputs = tuple(self.values.op_of(t) for t in ([] if makes(func) else given))
        changes = func._schema.is_mutable
        written = written_by(func, args, kwargs) if changes else []
        where = _frames(self.stack[-1], 0) if self.traced else ()
        name = func._schema.name.rpartition("::")[2]
        name = name[:-1] if changes and name.endswith("_") else name
        whole = None
        if self.traced:
            whole = self.result.graph.create_node("call_function", func, self.nodes_in(args), self.nodes_in(kwargs))
            whole.meta.update(call=self.stack[-1], where=where)
        if name == "copy" and len(inputs) == 2:
            inputs = inputs[1:]
        outputs = tensors_in(output)
        make = partial(
            self.new_op, name, inputs, where=where, args=tuple(None if isinstance(a, Tensor) else a for a in args),
            kwargs={k: v for k, v in kwargs.items() if not isinstance(v, Tensor)},
        )  # fmt: skip

        def make_part(index: int) -> Op:
            return make(outputs[index], self.part_of(whole, output, index))

        for index, tensor in enumerate(outputs):
            if index and role_of(name) != "part":  # a norm's statistics, a pool's indices: hardly ever used
                self.values.keep_for_later(tensor, partial(make_part, index))
                continue
            op = make_part(index)
            op.inplace = any(tensor is t for t in written)
            self.values.keep(tensor, op)
        for tensor in written:
            if not any(tensor is t for t in outputs):
                op = make(tensor, self.rewritten(tensor, whole))
                op.inplace = not outputs
                self.values.keep(tensor, op)
        if written:
            self.values.change_aliases(written, {id(t) for t in written})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        with_values = [t for t in given if not t.is_meta]
        if not self.on_gpu and kwargs.get("device") not in (None, torch.device("meta")):
            # wherever the model's code wants a value, its copy is on meta, or on the CPU
            kwargs = {**kwargs, "device": torch.device("cpu" if len(with_values) == len(given) else "meta")}
        if len(with_values) == len(given):
            return func(*args, **kwargs)
        if with_values:
            if func._schema.is_mutable and not all(t.is_meta for t in written_by(func, args, kwargs)):
                raise self.needs(NeedsValues("a tensor with values is changed by one without"))
            args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else on_meta(t), (args, kwargs))
        try:
            return self.on_meta.run(func, args, kwargs)
        except Exception as error:
            raise self.needs(error) from None

    def needs(self, error: Exception) -> Exception:
        """Note that values are needed, even if the model's code catches the error; others occur with values, too."""
        if isinstance(error, (NeedsValues, NotImplementedError)) or "meta" in str(error).lower():
            self.needed_values = self.needed_values or error
        return error

    # Operations and their nodes

    def new_op(
        self, name: str, inputs: tuple[Op, ...], tensor: Tensor, node: fx.Node | None, *, where: Where = (),
        args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, call: Call | None = None,
    ) -> Op:  # fmt: skip
        call = call or self.stack[-1]
        index, kwargs = len(self.result.ops), kwargs or {}
        op = Op(index, name, inputs, args, tensor.shape, tensor.dtype, call, where=where, node=node, kwargs=kwargs)
        self.result.ops.append(op)
        if node is not None:
            node.meta.update(shape=tensor.shape, dtype=tensor.dtype, call=call, where=where)
        return op

    def given(self, tensor: Tensor, path: str | None) -> Op:
        """Add a tensor that no operation computed: an input of the network, a parameter or buffer, or a constant."""
        call = self.stack[-1] if self.stack else Call(self.result.model, "", None, 0)
        node, graph = None, self.result.graph
        if self.traced:
            if self.stack:
                node = graph.create_node("get_attr", path or f"constant_{len(self.result.ops)}")
            else:
                node = graph.placeholder(f"input_{len(self.result.ops) + 1}")
        op = self.new_op("param" if self.stack else "input", (), tensor, node, call=call)
        op.path = path
        return op

    def changed_elsewhere(self, tensor: Tensor, before: Op, by: Op) -> Op:
        """Add a value whose data was changed through an alias, completely or in part."""
        node = self.rewritten(tensor, by.node)
        if tensor.shape.numel() == by.shape.numel():
            return self.new_op("alias", (by,), tensor, node)
        return self.new_op("write", (before, by), tensor, node)

    def rewritten(self, tensor: Tensor, by: fx.Node | None) -> fx.Node | None:
        before = self.nodes_in(tensor)
        return None if by is None else self.result.graph.call_function(rewritten, (before, by))

    def part_of(self, whole: fx.Node | None, output: Any, index: int) -> fx.Node | None:
        """Return the node of one of the tensors that an operation returned."""
        if whole is None or isinstance(output, Tensor):
            return whole
        flat = isinstance(output, (tuple, list)) and all(isinstance(value, Tensor) for value in output)
        return self.result.graph.call_function(operator.getitem if flat else tensor_of, (whole, index))

    def nodes_in(self, value: Any) -> Any:
        return fx.node.map_aggregate(value, self.node_of)

    def node_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            op = self.values.known(value)
            return None if op is None else op.node
        inside = tensors_in(value)
        return tuple(map(self.node_of, inside)) if inside else value


def record_run(
    model: nn.Module, inputs: Inputs, on_meta: MetaOperations | None = None, *, traced: bool = True
) -> Record:
    """Run a model once and record it. The model is a copy made by the caller, in the mode in which it is to run.

    Args:
        model, inputs: the model and its inputs, on the meta device or on the CPU.
        on_meta: the cached results of operations on the meta device from earlier recordings.
        traced: build the graph, and note the frames. Otherwise, the record is only useful for comparison with another.

    Returns:
        The record. If the run raised an error, it ends before that, with the reason in ``broke_off``.

    Raises:
        NeedsValues: If the model and its inputs are on the meta device, and the run needs values.
    """
    result = Record(model, inputs)
    with forked_randomness():
        recorder = _Recorder(result, on_meta or MetaOperations(), traced)
        # a script module doesn't support such hooks; its operations count as its caller's
        hooked = [m for m in recorder.modules if not isinstance(m, torch.jit.ScriptModule)]
        handles = [module.register_forward_pre_hook(recorder.begin, with_kwargs=True) for module in hooked]
        handles += [m.register_forward_hook(recorder.end, with_kwargs=True, always_call=True) for m in hooked]
        try:
            own = copied(inputs, lambda tensor: tensor)  # a forward may write into a list or dict that it gets
            with recorder:
                model(*own.args, **own.kwargs)
        except Exception as error:
            if inputs.is_meta:
                recorder.needs(error)
            result.broke_in = recorder.failed_in
            result.broke_off = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        finally:
            for handle in handles:
                handle.remove()
            for call in result.calls:
                call.end = call.end or len(result.ops)
    if recorder.needed_values is not None:
        raise NeedsValues(str(recorder.needed_values)) from recorder.needed_values
    return result
