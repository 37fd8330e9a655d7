"""The graph of each retrofitted block, before and after, as ``torch.fx.Graph`` with the shapes that flow in it.

A block's forward is traced one level deep (``se_retrofit.tracing``); then containers without a forward of their own
(``nn.Sequential``) and modules that hold an SE module are opened, so that the SE stands among its neighbours. The graph
before is traced from the block's original class, not derived from the graph after.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..attention import SEAttention
from ..errors import RetrofitError
from ..derived import RetrofittedBlock
from ..removal import strip
from ..plan import Plan, Site
from ..rehearsal import Call, Ghosts, Rehearsal, base_class, make_ghost, rehearse, untouched_randomness
from ..retrofit import plan_of
from ..tracing import TraceFailure, trace

__all__ = ["BlockGraph", "BlockPair", "Inspection", "block_graphs", "code_of", "find_block", "inspect_model"]


@dataclass(eq=False)
class BlockGraph:
    """One graph of a block, before or after.

    Attributes:
        graph: its nodes; the target of a ``call_module`` node is a path relative to ``scope``.
        values: what each node computes, as tensors on the meta device.
        modules: the module that each ``call_module`` node calls.
        scope: path of the module whose forward this is, or is a part of.
    """

    graph: fx.Graph
    values: dict[fx.Node, Any]
    modules: dict[fx.Node, nn.Module]
    scope: str

    @property
    def ses(self) -> list[fx.Node]:
        """The nodes that call an inserted SE module."""
        return [node for node, module in self.modules.items() if isinstance(module, SEAttention)]

    @property
    def items(self) -> set[fx.Node]:
        """The nodes that take one feature map out of a list that the block is given (as DenseNet's layers are)."""
        return {
            n
            for n in self.graph.nodes
            if self.kind(n) == "getitem" and n.args[0] in self.graph.find_nodes(op="placeholder")
        }

    def shape(self, node: fx.Node) -> str:
        """What a node computes, without the batch dim: ``256x56x56``."""
        return _shape(self.values.get(node))

    def kind(self, node: fx.Node) -> str:
        """Class of the module that a node calls, or the name of its function."""
        if node in self.modules:
            return class_name(self.modules[node])
        if node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target))
            return {"iadd": "+=", "add": "+", "mul": "*", "imul": "*=", "sub": "-", "truediv": "/"}.get(name, name)
        return str(node.target) if node.op == "call_method" else node.op

    def label(self, node: fx.Node, prefix: str = "") -> str:
        """A node in few words: ``bn3 (BatchNorm2d)``, ``+=``, ``* layer_scale``, ``output``."""
        if node.op == "call_module":
            return f"{join(prefix, str(node.target))} ({self.kind(node)})"
        if node.op == "placeholder":
            return f"input {node.name}"
        if node.op == "get_attr":
            return str(node.target)
        constants = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        return " ".join([self.kind(node), *constants])


@dataclass(eq=False)
class BlockPair:
    """A block before and after its retrofit, and the sites in it. Where it can't be traced, ``failure`` says why."""

    path: str
    kind: str
    cls: str
    sites: list[Site]
    module: nn.Module
    root: nn.Module
    before: BlockGraph | None = None
    after: BlockGraph | None = None
    failure: str | None = None
    calls: int = 1
    whole: BlockGraph | None = None  # the graph after of which the block is a part

    def se_node(self, site: Site) -> fx.Node | None:
        """The node of the graph after that calls a site's SE module."""
        return _call_to(self.after, site.path)

    def se_after(self, site: Site) -> str:
        """What a site's SE follows, in few words."""
        owner = site.path.rpartition(".")[0]
        module = _submodule(self.root, owner)
        if owner != self.path and isinstance(module, RetrofittedBlock) and module.se_how == "wrap":
            # the module is opened in the graph, where what it does has another name
            return f"{_relative(owner, self.path)} ({class_name(module)})"
        node = self.se_node(site)
        return self.after.label(node.args[0]) if node is not None and self.after is not None else site.after  # type: ignore[arg-type]

    def se_before(self, site: Site) -> str:
        """What takes the value that a site's SE has scaled, in few words."""
        graph, prefix = (self.after, "") if self.whole is None else (self.whole, self.whole.scope)
        node = _call_to(graph, site.path)
        if node is None or graph is None:
            return ""
        return ", ".join(dict.fromkeys(graph.label(user, prefix) for user in node.users))

    def signature(self) -> tuple[Any, ...]:
        """Equal for blocks that differ in nothing but names and numbers of channels."""
        if self.before is None or self.after is None:
            return (self.cls, self.path)
        return (self.cls, self.kind, _structure(self.before), _structure(self.after))


@dataclass(eq=False)
class Inspection:
    """A retrofitted model, its plan, and its blocks in the order of the plan."""

    model: nn.Module
    plan: Plan
    rehearsal: Rehearsal
    blocks: list[BlockPair] = field(default_factory=list)

    def distinct(self) -> list[list[BlockPair]]:
        """The blocks in groups of the same structure, the one that shows it best first: of dense layers, the first that
        is given several feature maps."""
        groups: dict[tuple[Any, ...], list[BlockPair]] = {}
        for block in self.blocks:
            groups.setdefault(block.signature(), []).append(block)
        for group in groups.values():
            best = max(group, key=lambda pair: min(len(pair.after.items), 2) if pair.after else 0)
            group.remove(best)
            group.insert(0, best)
        return list(groups.values())


def join(*parts: str) -> str:
    """A module path from parts, any of which may be empty."""
    return ".".join(part for part in parts if part)


def _call_to(block: BlockGraph | None, path: str) -> fx.Node | None:
    if block is None:
        return None
    return next((node for node in block.ses if join(block.scope, str(node.target)) == path), None)


def _relative(path: str, block: str) -> str:
    return path[len(block) + 1 :] if block and path.startswith(f"{block}.") else path


def class_name(module: nn.Module) -> str:
    """Name of a module's class as it was before a retrofit."""
    cls = base_class(module)
    return (cls.se_base if issubclass(cls, RetrofittedBlock) else cls).__name__


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(str(int(s)) for s in value.shape[1:]) or "scalar"
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        return ", ".join(map(_shape, value))
    return ""


def inspect_model(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Trace each retrofitted block of a model, before and after.

    Args:
        model: a model that ``add_se`` has retrofitted; it is not touched.
        example_inputs: a tensor or a tuple of positional inputs, for the shapes; without it, as in ``add_se``.

    Raises:
        RetrofitError: the model has no SE that ``add_se`` put in, or can't be run on the inputs.
        TypeError: it is no model, or the inputs are neither a tensor nor a tuple.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    try:
        plan = plan_of(model)
    except RetrofitError as error:
        raise RetrofitError(
            f"{error}: call add_se(model) first, or print(plan_se(model)) to see what it would do"
        ) from None
    rehearsal = rehearse(model, example_inputs)
    with untouched_randomness():
        base, base_ghosts = make_ghost(model, prepare=strip)
        base.eval()
        tracing = _Tracing(rehearsal, base, base_ghosts)
        blocks: dict[str, BlockPair] = {}
        for site in plan.sites:
            if site.block not in blocks:
                module = _submodule(model, site.block)
                blocks[site.block] = BlockPair(site.block, site.kind, class_name(module), [], module, model)
            blocks[site.block].sites.append(site)
        for pair in blocks.values():
            tracing.fill(pair)
    return Inspection(model, plan, rehearsal, list(blocks.values()))


def block_graphs(model: nn.Module, example_inputs: Any = None) -> dict[str, BlockPair]:
    """The graphs of each retrofitted block, before and after, by the block's path.

    Args, raises: as ``inspect_model``.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.inspection import block_graphs
        >>> pair = block_graphs(add_se(timm.create_model("resnet18")))["layer1.0"]
        >>> type(pair.after.graph)
        <class 'torch.fx.graph.Graph'>
        >>> len(pair.after.graph.nodes) - len(pair.before.graph.nodes)
        1
    """
    return {pair.path: pair for pair in inspect_model(model, example_inputs).blocks}


def find_block(inspection: Inspection, path: str) -> BlockPair:
    """The block of this path, or the one that an SE module of this path sits in.

    Raises:
        RetrofitError: there is none; the message lists some that there are.
    """
    for pair in inspection.blocks:
        if path == pair.path or any(path == site.path for site in pair.sites):
            return pair
    paths = [pair.path for pair in inspection.blocks]
    few = ", ".join(paths[:6]) + (f", ... ({len(paths)} in all)" if len(paths) > 6 else "")
    raise RetrofitError(f"no retrofitted block {path!r}; the blocks with SE are {few}")


# Tracing --------------------------------------------------------------------------------------------------------------


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a path that only the graph of a GraphModule knows
        return model


class _Tracing:
    def __init__(self, rehearsal: Rehearsal, base: nn.Module, base_ghosts: Ghosts) -> None:
        self.ghosts = rehearsal.ghosts
        self.base, self.base_ghosts = base, base_ghosts
        self.calls: dict[str, list[Call]] = {}
        for call in rehearsal.root.walk():
            self.calls.setdefault(call.path, []).append(call)
        self.opened: dict[str, tuple[BlockGraph, BlockGraph]] = {}

    def fill(self, pair: BlockPair) -> None:
        """Put the graphs into a pair, or the reason why there are none."""
        scope = self.scope(pair)
        if scope is None:
            pair.failure = "the rehearsal did not get to it"
            return
        pair.calls = len(self.calls[scope])
        try:
            if scope not in self.opened:
                self.opened[scope] = self.open(scope)
            pair.before, pair.after = self.opened[scope]
        except TraceFailure as failure:
            pair.failure = str(failure)
            return
        if scope != pair.path:
            pair.whole = pair.after
            pair.before, pair.after = _slices(pair, pair.before, pair.after)

    def scope(self, pair: BlockPair) -> str | None:
        """Path of the innermost module that is called and holds the block and its sites."""
        paths = [pair.path, *(site.path.rpartition(".")[0] for site in pair.sites)]
        candidate = pair.path
        while True:
            if candidate in self.calls and all(
                p == candidate or not candidate or p.startswith(f"{candidate}.") for p in paths
            ):
                return candidate
            if not candidate:
                return None
            candidate = candidate.rpartition(".")[0]

    def open(self, scope: str) -> tuple[BlockGraph, BlockGraph]:
        call = self.calls[scope][0]
        after = _opened(self.ghosts, call, scope, _holds_se)
        # what is open after is open before, so that the two differ in nothing but SE
        opened = {p for p, calls in self.calls.items() if _holds_se(calls[0].module)}
        twin = Call(self.base.get_submodule(scope), scope, call.args, call.kwargs, None)
        before = _opened(self.base_ghosts, twin, scope, lambda m: self.base_ghosts.paths.get(id(m)) in opened)
        return before, after


def _holds_se(module: nn.Module) -> bool:
    return not isinstance(module, SEAttention) and any(isinstance(m, SEAttention) for m in module.modules())


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and getattr(base_class(module), "forward", None) is nn.Sequential.forward


def _opened(ghosts: Ghosts, call: Call, scope: str, holds_se: Callable[[nn.Module], bool]) -> BlockGraph:
    """The graph of a call, with the graphs of its containers put in."""
    result = BlockGraph(fx.Graph(), {}, {}, scope)
    graph, values, modules = result.graph, result.values, result.modules

    def copy_in(call: Call, prefix: str, given: dict[str, Any] | None) -> Any:
        """Copy the nodes of a call's graph; returns what the call returns."""
        block = trace(ghosts, call)
        copies: dict[fx.Node, Any] = {}
        for node in block.graph.nodes:
            args, kwargs = _replaced(node.args, copies), _replaced(node.kwargs, copies)
            if node.op == "output":
                return args[0]
            if node.op == "placeholder" and given is not None:
                copies[node] = given[str(node.target).lstrip("*")]
                continue
            if getattr(node.target, "__name__", "") == "getitem" and isinstance(args[0], (list, tuple, dict)):
                copies[node] = args[0][args[1]]
                continue
            if node.op == "call_module":
                module = call.module.get_submodule(str(node.target))
                if _is_container(module) or holds_se(module):
                    inner = block.calls.get(node) or _call_of(block, node, module)
                    try:
                        copies[node] = copy_in(inner, join(prefix, str(node.target)), _bind(module, args, kwargs))
                        continue
                    except TraceFailure:  # raised before the first node is copied: it stays closed
                        pass
            target = join(prefix, str(node.target)) if node.op in ("call_module", "get_attr") else node.target
            name = str(node.name) if not prefix or node.op != "call_module" else re.sub(r"\W", "_", target)
            copies[node] = copied = graph.create_node(node.op, target, args, kwargs, name=name, type_expr=node.type)
            values[copied] = block.values.get(node)
            if node.op == "call_module":
                modules[copied] = call.module.get_submodule(str(node.target))
        return None

    graph.output(copy_in(call, "", None))
    for node in list(graph.nodes):  # parameters of the forward that this call left at their defaults
        if node.op == "placeholder" and not node.users and not isinstance(values[node], Tensor):
            graph.erase_node(node)
    return result


def _call_of(block: Any, node: fx.Node, module: nn.Module) -> Call:
    args, kwargs = _replaced(node.args, block.values), _replaced(node.kwargs, block.values)
    return Call(module, "", tuple(args), dict(kwargs), None)


def _replaced(arguments: Any, values: Any) -> Any:
    """The arguments of a node, with what ``values`` says in the place of each node among them."""
    return map_aggregate(arguments, lambda a: values[a] if isinstance(a, fx.Node) else a)


def _bind(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    if isinstance(module, fx.GraphModule):
        names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
        return {**dict(zip(names, args, strict=False)), **kwargs}
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


# A block that is a part of a larger graph -----------------------------------------------------------------------------


def _slices(pair: BlockPair, before: BlockGraph, after: BlockGraph) -> tuple[BlockGraph, BlockGraph]:
    """The parts of two graphs that are this block: from its first module to its last or to its SE."""
    own = {site.path for site in pair.sites}

    def inside(node: fx.Node) -> bool:
        path = join(after.scope, str(node.target)) if node.op in ("call_module", "get_attr") else ""
        return bool(path) and (path in own or path == pair.path or path.startswith(f"{pair.path}."))

    nodes = list(after.graph.nodes)
    positions = [i for i, node in enumerate(nodes) if inside(node)]
    first, last = positions[0], positions[-1]
    while pair.kind != "chain" and nodes[last + 1].op in ("call_function", "call_method"):
        last += 1
    ses = set(after.ses)
    earlier = sum(node in ses for node in nodes[:first])
    part = nodes[first : last + 1]
    number = len(part) - sum(node in ses for node in part)
    original = list(before.graph.nodes)[first - earlier :][:number]
    return _slice(before, original), _slice(after, part)


def _slice(whole: BlockGraph, nodes: list[fx.Node]) -> BlockGraph:
    """A graph of some consecutive nodes, with paths from the model's root."""
    part = BlockGraph(fx.Graph(), {}, {}, "")
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in copies and source not in nodes:
                copies[source] = part.graph.placeholder("x" if not copies else f"x_{len(copies)}")
                part.values[copies[source]] = whole.values.get(source)
    for node in nodes:
        args, kwargs = _replaced(node.args, copies), _replaced(node.kwargs, copies)
        target = join(whole.scope, str(node.target)) if node.op in ("call_module", "get_attr") else node.target
        copies[node] = part.graph.create_node(node.op, target, args, kwargs, _name(whole, node), node.type)
        part.values[copies[node]] = whole.values.get(node)
        if node in whole.modules:
            part.modules[copies[node]] = whole.modules[node]
    results = [copies[n] for n in nodes if any(user not in copies for user in n.users)]
    part.graph.output(results[0] if len(results) == 1 else tuple(results))
    return part


def _name(whole: BlockGraph, node: fx.Node) -> str:
    if node.op != "call_module" or not whole.scope:
        return node.name
    return re.sub(r"\W", "_", join(whole.scope, str(node.target)))


# Graphs as keys and as code -------------------------------------------------------------------------------------------


def _structure(block: BlockGraph) -> tuple[Any, ...]:
    # how many feature maps a list holds makes no other block of a dense layer
    items = block.items
    order = {node: i for i, node in enumerate(n for n in block.graph.nodes if n not in items)}
    order.update({item: order[item.args[0]] for item in items})
    rows = []
    for node in block.graph.nodes:
        if node in items:
            continue
        module = block.modules.get(node)
        detail: Any = None
        if isinstance(module, nn.modules.conv._ConvNd):
            detail = (module.kernel_size, module.groups > 1)
        target = block.kind(node) if node.op != "placeholder" else ""
        rows.append((node.op, target, detail, tuple(dict.fromkeys(order[n] for n in node.all_input_nodes))))
    return tuple(rows)


_CLEAN_UP = re.compile(r";\s+(?:\w+ = )+None$")
_INDEX = re.compile(r"getattr\(([\w.\[\]]+), \"(\d+)\"\)")


def code_of(block: BlockGraph) -> list[str]:
    """A graph as lines of Python, without the deletions that only free memory."""
    lines = block.graph.python_code("self").src.strip("\n").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    return [tidy(line) for line in lines[start:] if line.strip()]


def tidy(line: str) -> str:
    """A line of generated code, made readable: no clean-up, and indices in the place of getattr."""
    line = _CLEAN_UP.sub("", line.rstrip())
    while True:
        shorter = _INDEX.sub(r"\1[\2]", line)
        if shorter == line:
            return line
        line = shorter


def is_se_line(line: str, pair: BlockPair) -> bool:
    """Whether a line of a block's code calls one of its SE modules."""
    return any(f".{site.path.rpartition('.')[2]}(" in line for site in pair.sites)


def describe(module: nn.Module) -> str:
    """A module in few words: ``Conv2d 64 -> 256, 1x1``, ``SE 256 -> 16 -> 256``."""
    name = class_name(module)
    if isinstance(module, SEAttention):
        return f"SE {module.channel} -> {module.hidden} -> {module.channel}"
    if isinstance(module, nn.modules.conv._ConvNd):
        words = [f"{name} {module.in_channels} -> {module.out_channels}", "x".join(map(str, module.kernel_size))]
        if any(s != 1 for s in module.stride):
            words.append(f"stride {module.stride[0] if len(set(module.stride)) == 1 else module.stride}")
        if module.groups > 1:
            words.append("depthwise" if module.groups == module.in_channels else f"{module.groups} groups")
        return ", ".join(words)
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features} -> {module.out_features}"
    return name


def batch_size(args: tuple[Any, ...]) -> int:
    """How many inputs a call has: the first dim of the first tensor, or the length of a list of images."""
    if args and isinstance(args[0], Tensor) and args[0].dim() > 2:
        return int(args[0].shape[0])
    if args and isinstance(args[0], (list, tuple)) and args[0] and all(isinstance(a, Tensor) for a in args[0]):
        return len(args[0])
    return 1
