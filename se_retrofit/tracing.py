"""A torch.fx trace of one module's own forward, one level deep: all its children are leaves.

Differences from ``torch.fx.symbolic_trace``:

- It traces a ghost (see ``rehearsal``), so every proxy knows the (meta) value that it had in the rehearsal, and nothing
  is patched to intercept calls.
- Control flow on a proxy goes the way it went in the rehearsal and is put on record in the graph, as a call of
  ``expect``: the traced code follows that way or raises.
- In-place operators stay in place.
- What a graph can't show (a change of the grad mode or of autocast, a checkpoint, an attribute that the forward sets)
  is put on record as a flaw or raised, never left out silently.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from .errors import RetrofitError
from .rehearsal import Call, Ghosts, run_forward, snapshot

__all__ = ["Block", "Parameter", "TraceFailure", "expect", "trace"]


class TraceFailure(Exception):
    """The forward does something that a graph can't show; the message is a reason fit for the user."""


def expect(value: Any, expected: Any, where: str) -> None:
    """Raise unless a decision in the block's forward falls as it did when the block was retrofitted."""
    if value != expected:
        raise RetrofitError(
            f"{where} was retrofitted for a call in which a decision of its forward was {expected!r}, and now it is "
            f"{value!r}. Undo with remove_se, then call add_se with example_inputs like the ones used now"
        )


class _Unknown:
    """The value of a node that can't be computed without data."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = _Unknown()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a traced forward: a tensor, a size, a list, tuple or dict of them, or a concrete value."""

    name: str
    kind: str  # "tensor", "size", "sequence", "mapping" or "concrete"
    value: Any  # how many items a sequence holds; the keys of a mapping; the concrete value


@dataclass(eq=False)
class Block:
    """A module's own forward as a graph.

    Attributes:
        call: the rehearsed call that was traced.
        graph: its nodes; a ``call_module`` node's target is a path relative to the module.
        values: the meta value of each node.
        calls: the rehearsed call behind each ``call_module`` node, where there is one.
        parameters: how the forward was called.
        flaws: what the forward does that the graph doesn't show: good enough to read, not to be run in its place.
    """

    call: Call
    graph: fx.Graph
    values: dict[fx.Node, Any] = field(default_factory=dict)
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)

    @property
    def output(self) -> Any:
        """What the forward returns: a node or a structure of nodes."""
        return next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0]


class BlockProxy(fx.Proxy):
    """A proxy that knows the value it had in the rehearsal."""

    tracer: BlockTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # so that isinstance(x, Tensor) and the like hold in a block's own checks
        value = self.tracer.values.get(self.node, UNKNOWN)
        return BlockProxy if value is UNKNOWN else type(value)

    def __getattr__(self, name: str) -> Any:
        return BlockAttribute(self, name)

    def known(self) -> Any:
        value = self.tracer.values.get(self.node, UNKNOWN)
        if value is UNKNOWN:
            raise TraceFailure("its forward makes a decision that depends on data")
        return value

    def decided(self, convert: Callable[[Any], Any]) -> Any:
        """The value as a plain python value; the graph keeps on record that it was this one."""
        value = self.known()
        if isinstance(value, Tensor):
            raise TraceFailure("its forward makes a decision that depends on data")
        result = convert(value)
        self.tracer.record_decision(self, convert, result)
        return result

    def __bool__(self) -> bool:
        return self.decided(bool)

    def __int__(self) -> int:
        return self.decided(int)

    def __float__(self) -> float:
        return self.decided(float)

    def __index__(self) -> int:
        return self.decided(operator.index)

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        value = self.known()
        if isinstance(value, Tensor):
            return int(self.tracer.proxy_of("call_function", getattr, (self, "shape"))[0])
        return self.decided(len)

    def __iter__(self) -> Iterator[Any]:
        items: Any = self
        return iter([items[i] for i in range(len(self))])

    def __contains__(self, item: Any) -> bool:
        value = self.known()
        if isinstance(value, (Tensor, _Unknown)):
            raise TraceFailure("its forward makes a decision that depends on data")
        return bool(self.tracer.proxy_of("call_function", operator.contains, (self, item)))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __ceil__(self) -> Any:
        return self.decided(lambda v: -int(-v // 1))

    def __floor__(self) -> Any:
        return self.decided(lambda v: int(v // 1))

    def __trunc__(self) -> Any:
        return self.decided(int)

    def __round__(self, digits: int | None = None) -> Any:
        return self.decided(lambda v: round(v, digits) if digits is not None else round(v))

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockProxy:
        raise TraceFailure("its forward deep-copies a tensor")

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: Any = None, kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracer = _current_tracer(args, kwargs)
        if tracer is None:
            raise TraceFailure("its forward mixes traces")
        return tracer.function(orig_method, args or (), kwargs or {})


class BlockAttribute(BlockProxy):
    """``proxy.name``, which becomes a node only when it is used otherwise than as a method."""

    def __init__(self, root: BlockProxy, name: str) -> None:
        self.root = root
        self.attr = name
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        root = self.tracer.values.get(self.root.node, UNKNOWN)
        try:
            return type(getattr(root, self.attr))
        except AttributeError:
            return BlockAttribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def _inplace(name: str) -> Callable[[BlockProxy, Any], Any]:
    in_place, plain = (
        getattr(operator, f"i{name}"),
        getattr(operator, name if name not in ("and", "or") else f"{name}_"),
    )

    def method(self: BlockProxy, other: Any) -> Any:
        is_tensor = isinstance(self.tracer.values.get(self.node), Tensor)
        return self.tracer.create_proxy("call_function", in_place if is_tensor else plain, (self, other), {})

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
):
    setattr(BlockProxy, f"__i{_name}__", _inplace(_name))


def _current_tracer(*structures: Any) -> BlockTracer | None:
    stack = list(structures)
    while stack:
        item = stack.pop()
        kind = type(item)
        if issubclass(kind, BlockProxy):
            return item.tracer
        if issubclass(kind, (tuple, list)):
            stack.extend(item)
        elif issubclass(kind, dict):
            stack.extend(item.values())
        elif kind is slice:
            stack.extend((item.start, item.stop, item.step))
    return None


class _RecordFactories(TorchFunctionMode):
    """Records functions that are given no proxy but make a tensor (``torch.zeros``, ``torch.arange``, ...)."""

    def __init__(self, tracer: BlockTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.executing or _current_tracer(args, kwargs) is not None:
            return func(*args, **kwargs)
        return self.tracer.function(func, args, kwargs)


class BlockTracer(fx.Tracer):
    """Builds the graph of one ghost module's own forward."""

    def __init__(self, ghosts: Ghosts, call: Call) -> None:
        super().__init__()
        self.ghosts = ghosts
        self.call = call
        self.root = call.module
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.calls: dict[fx.Node, Call] = {}
        self.parameters: list[Parameter] = []
        self.executing = False
        self.rehearsed = iter(call.children)
        self.names = {id(m): name for name, m in self.root.named_modules(remove_duplicate=True)}
        self.flaws: list[str] = []

    # What the ghost and its proxies report

    def listens_to(self, module: nn.Module) -> bool:
        return not self.executing

    def record_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.names.get(id(module))
        if name is None:
            raise TraceFailure(f"its forward calls a {type(module).__name__} that is not registered as its child")
        if name == "":
            raise TraceFailure("its forward calls itself")
        return self.create_proxy("call_module", name, args, kwargs)

    def attribute(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """A parameter or buffer that the forward reads."""
        if self.executing:
            return value
        owner = self.names.get(id(module))
        if owner is None:
            raise TraceFailure(f"its forward reads {name} of a module that is not registered as its child")
        return self.create_proxy("get_attr", f"{owner}.{name}" if owner else name, (), {})

    def attribute_set(self, name: str) -> None:
        if not self.executing:
            raise TraceFailure(f"its forward sets the attribute {name}")

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function or a method of Tensor."""
        if func is Tensor.__torch_function__ or getattr(func, "__name__", "") == "__get__":
            return self.create_proxy("call_function", getattr, (args[0], func.__self__.__name__), {})
        if torch.overrides.is_tensor_method_or_property(func):
            return self.create_proxy("call_method", func.__name__, args, kwargs)
        if type(func).__name__ == "ScriptMethod":
            raise TraceFailure("its forward calls a scripted method")
        return self.create_proxy("call_function", func, args, kwargs)

    def proxy_of(self, op: str, target: Any, args: tuple[Any, ...]) -> Any:
        return self.create_proxy(op, target, args, {})

    def record_decision(self, proxy: BlockProxy, convert: Callable[[Any], Any], result: Any) -> None:
        node = proxy.node
        name = getattr(convert, "__name__", "")
        if convert in (bool, len):
            node = self.graph.call_function(convert, (node,))
            self.values[node] = result
        elif name == "<lambda>":
            result = self.values[node]
        self.graph.call_function(expect, (node, result, self.where))

    @property
    def where(self) -> str:
        return f"block {self.call.path or '(model)'}"

    # fx's own hooks

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind not in ("placeholder", "output"):
            self.check_context()
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        node = proxy.node
        if node not in self.values:
            self.values[node] = self.compute(node)
        return None if self.values[node] is None and kind != "placeholder" else proxy

    def proxy(self, node: fx.Node) -> BlockProxy:
        return BlockProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), BlockProxy):
            return a.node
        if isinstance(a, Tensor):
            self.flaw("its forward uses a tensor that is neither an input nor a registered parameter or buffer")
            node = self.graph.get_attr("unregistered_tensor")
            self.values[node] = a
            return node
        if type(a) is torch.Size:
            a = tuple(a)
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise TraceFailure(f"its forward passes on a {type(a).__name__}, which a graph can't hold") from error

    def check_context(self) -> None:
        """Notice a context that the forward entered and that the graph loses."""
        if not torch.is_grad_enabled():
            self.flaw("its forward changes the grad mode")
        if not torch.is_autocast_enabled("cpu") or not torch.is_autocast_enabled("cuda"):
            self.flaw("its forward changes autocast")
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            self.flaw("its forward uses torch.utils.checkpoint")

    def flaw(self, reason: str) -> None:
        if reason not in self.flaws:
            self.flaws.append(reason)

    # Values

    def compute(self, node: fx.Node) -> Any:
        """The node's meta value: from the rehearsal if it is a module call, else by running it."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            call = next(self.rehearsed, None)
            if call is not None and call.module is module:
                self.calls[node] = call
                return snapshot(call.output)
            self.rehearsed = iter(())  # this trace has left the rehearsed way
        executing, self.executing = self.executing, True
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return self.execute(node)
        except TraceFailure:
            raise
        except Exception as error:
            text = str(error).lower()
            if "meta" in text or isinstance(error, NotImplementedError):
                return UNKNOWN
            raise
        finally:
            self.executing = executing

    def execute(self, node: fx.Node) -> Any:
        unknown = False

        def value(n: Any) -> Any:
            nonlocal unknown
            if not isinstance(n, fx.Node):
                return n
            result = self.values[n]
            unknown = unknown or result is UNKNOWN
            return result

        args, kwargs = map_aggregate(node.args, value), map_aggregate(node.kwargs, value)
        if unknown:
            return UNKNOWN
        if node.op == "call_module":
            return run_forward(self.root.get_submodule(str(node.target)), tuple(args), dict(kwargs))
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            module = self.root.get_submodule(owner)
            return nn.Module.__getattr__(module, name)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    # The trace

    def parameter(self, parameter: inspect.Parameter, value: Any) -> Any:
        """A parameter of the forward, as proxies where it is made of tensors."""
        name = parameter.name
        prefix = stars(parameter)
        proxy = self.create_placeholder(prefix + name, value)
        if isinstance(value, Tensor):
            self.parameters.append(Parameter(name, "tensor", None))
            return proxy
        if isinstance(value, int) and not isinstance(value, bool):  # a size, likely: it stays symbolic
            self.parameters.append(Parameter(name, "size", None))
            return proxy
        if isinstance(value, (list, tuple)) and value and all(_is_symbolic(v) for v in value):
            self.parameters.append(Parameter(name, "sequence", len(value)))
            kind = list if isinstance(value, list) else tuple
            return kind(self.create_proxy("call_function", operator.getitem, (proxy, i), {}) for i in range(len(value)))
        if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
            self.parameters.append(Parameter(name, "mapping", list(value)))
            return type(value)((k, self.create_proxy("call_function", operator.getitem, (proxy, k), {})) for k in value)
        if _is_plain(value):
            self.parameters.append(Parameter(name, "concrete", value))
            return value
        raise TraceFailure(
            f"its forward takes an object, the {type(value).__name__} {name}, which is neither a tensor nor plain data"
        )

    def create_placeholder(self, target: str, value: Any) -> BlockProxy:
        node = self.graph.create_node("placeholder", target, (), {})
        self.values[node] = value
        return BlockProxy(node, self)

    def run(self) -> Block:
        forward = self.root.forward
        bound = inspect.signature(forward).bind(*self.call.args, **self.call.kwargs)
        bound.apply_defaults()
        given = {}
        for name, parameter in inspect.signature(forward).parameters.items():
            given[name] = self.parameter(parameter, bound.arguments[name])
        before = snapshot(given)
        bound.arguments.update(given)
        output = forward(*bound.args, **bound.kwargs)
        for name, value in given.items():
            if isinstance(value, list) and [id(v) for v in value] != [id(v) for v in before[name]]:
                self.flaw(f"its forward changes the list that it is given as {name}")
        self.graph.output(self.create_arg(output))
        self.values[next(iter(reversed(self.graph.nodes)))] = None
        return Block(self.call, self.graph, self.values, self.calls, self.parameters, self.flaws)


def stars(parameter: inspect.Parameter) -> str:
    """What stands before a parameter's name in a signature."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is parameter.VAR_KEYWORD else ""


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and not isinstance(value, bool))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _read_graph_module(ghosts: Ghosts, call: Call) -> Block:
    """The block of a GraphModule: its graph is there already and only wants values."""
    tracer = BlockTracer(ghosts, call)
    module = call.module
    graph: fx.Graph = module.graph  # type: ignore[assignment]
    tracer.graph = graph
    inputs = list(call.args)
    for node in graph.nodes:
        if node.op == "placeholder":
            if inputs:
                value = inputs.pop(0)
            else:
                value = call.kwargs.get(node.target, node.args[0] if node.args else UNKNOWN)
            tracer.values[node] = value
        elif node.op == "output":
            tracer.values[node] = None
        else:
            tracer.values[node] = tracer.compute(node)
    return Block(call, graph, tracer.values, tracer.calls)


def _reason(error: Exception) -> str:
    """Why a forward can't be traced, in words for the user."""
    frames = error.__traceback__
    while frames is not None:
        if frames.tb_frame.f_code.co_filename.endswith("torch/utils/checkpoint.py"):
            return "its forward uses torch.utils.checkpoint"
        frames = frames.tb_next
    lines = str(error).strip().splitlines()
    return f"its forward can't be traced: {type(error).__name__}: {lines[0] if lines else ''}"


def trace(ghosts: Ghosts, call: Call, training: bool = False) -> Block:
    """Trace the own forward of the module that ``call`` called, along the way that this call took.

    Raises:
        TraceFailure: the forward does something that a graph can't show.
    """
    if isinstance(call.module, fx.GraphModule):
        return _read_graph_module(ghosts, call)
    tracer = BlockTracer(ghosts, call)
    modes = [(m, m.training) for m in call.module.modules()] if training else []
    for module, _ in modes:
        module.__dict__["training"] = True
    cuda_autocast = torch.is_autocast_enabled("cuda")
    ghosts.tracer = tracer
    try:
        torch.set_autocast_enabled("cuda", True)
        with torch.enable_grad(), torch.autocast("cpu"), _RecordFactories(tracer):
            return tracer.run()
    except TraceFailure:
        raise
    except Exception as error:
        raise TraceFailure(_reason(error)) from error
    finally:
        ghosts.tracer = None
        torch.set_autocast_enabled("cuda", cuda_autocast)
        for module, mode in modes:
            module.__dict__["training"] = mode
