"""The ways in which a module can call SE at a place, in the order in which they are tried.

They are not proven correct here: the edited copy is recorded, and its record is compared with the original's (see
``check``). If a way turns out to be wrong, the next one is tried.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from torch import fx, nn

from ...plan import Edit
from ..blocks.block import Place
from ..record.facts import only_user
from ..record.graph import Call, Op, Where
from ..record.methods import Method, methods_of
from ..record.roles import is_sequential
from .carry import class_name, forward_digest, has_attribute
from .graphs import in_graph
from .source import Source, SpliceError, node_at, own_nodes, source_of, span_of

SE_NAME = "se_attention"


def ways(place: Place) -> Iterator[Edit | SpliceError]:
    """Yield the ways to call SE at a place, best first; if one is not possible, the reason."""
    if place.users is not None:
        yield from _at_users(place.call, place.op, place.users)
        return
    if place.kind == "rep-sum":  # the sum may be fused into one convolution later; a module after it works with both
        for op, module, path in reversed(place.call.passes):
            if op is place.op:
                yield from _as_returned(path, module)
    yield from _at_value(place.call, place.op)
    call = place.call
    while call.returned is place.op and call.parent is not None:  # the output of a module is also a value of its caller
        call = call.parent
        if is_sequential(call.module) and call.returned is place.op:
            yield Edit(call.path, "append")
        yield from _in_source(call, place.op)
    user = only_user(place.op)
    if user is not None and place.call.holds(user):  # the final value of a loop: at its user
        yield from _at_users(place.call, place.op, frozenset([user]))


def _at_value(call: Call, op: Op) -> Iterator[Edit | SpliceError]:
    """Yield ways in the code of the called module, then in that of a module that it calls for the value."""
    if isinstance(call.module, fx.GraphModule):
        yield in_graph(call, op)
        return
    if is_sequential(call.module) and call.returned is op:
        yield Edit(call.path, "append")
    elif not is_sequential(call.module):
        yield from _in_source(call, op)
    if op.call is call and op.module is not None and op.path is not None:
        yield from _as_returned(op.path, op.module)
    for child in call.children:
        if child.returned is op:
            yield from _at_value(child, op)
    if call.returned is op and not is_sequential(call.module):
        yield from _as_returned(call.path, call.module)


def _in_source(call: Call, op: Op) -> Iterator[Edit | SpliceError]:
    """Yield ways at the expressions of a module's own methods that compute the value."""
    if isinstance(call.module, fx.GraphModule):
        yield in_graph(call, op)
        return
    appearances = [op.where] if op.call is call else []
    appearances += [child.where for child in call.children if child.returned is op]
    for where in appearances:
        yield from _splices(call, where, partial(_statements, op))


def _at_users(call: Call, op: Op, users: frozenset[Op]) -> Iterator[Edit | SpliceError]:
    """Yield ways to pass a value through SE only where some operations use it."""
    if isinstance(call.module, fx.GraphModule):
        yield in_graph(call, op, users)
        return
    if len(users) != 1:
        yield SpliceError(f"{len(users)} operations take the value that SE should recalibrate")
        return
    (user,) = users
    while not call.holds(user) and call.parent is not None:  # further inside: an in-place ReLU on the block's input
        call = call.parent
    yield from _splices(call, call.where_of(user), _operands)


# The change in a source: the statement of an edit, its node, and its target
_Forms = Iterator[tuple[str, ast.AST, str]]


def _statements(op: Op, source: Source, node: ast.AST) -> _Forms:
    """Yield the forms that a call of SE can have for the value of an expression."""
    if isinstance(node, ast.AugAssign):
        yield "after", node, source.text(node.target)
        return
    yield "wrap", node, ""
    statement = next((s for s in source.nodes if isinstance(s, ast.Expr) and s.value is node), None)
    if statement is not None and op.inplace and isinstance(node, ast.Call):  # F.relu_(x), whose result is unused
        arguments = [*node.args[:1], *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
        for target in arguments:
            if isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
                yield "after", statement, source.text(target)


def _operands(source: Source, node: ast.AST) -> _Forms:
    """Yield the forms that it can have for the operands of an expression."""
    operands: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        operands = [node.left, node.right]
    elif isinstance(node, ast.AugAssign):
        operands = [node.value]
    elif isinstance(node, ast.Call):
        operands = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        operands += [keyword.value for keyword in node.keywords if keyword.arg is not None]
        operands += [node.func.value] if isinstance(node.func, ast.Attribute) else []
    yield from (("wrap", operand, "") for operand in operands)
    if isinstance(node, ast.AugAssign):
        yield "before", node, source.text(node.target)


def _splices(call: Call, where: Where, forms: Callable[[Source, ast.AST], _Forms]) -> Iterator[Edit | SpliceError]:
    """Yield splices at the nodes that a module's own frames were executing, innermost first."""
    if "forward" in vars(call.module):
        yield SpliceError(f"the forward of {call.path or 'the model'} is set on the instance, not by its class")
        return
    own = methods_of(type(call.module))
    for code, lasti in where:
        method = own[code]
        try:
            if method.self_name is None:
                raise SpliceError(f"{method.function.__qualname__} has no self")
            source = source_of(method.function)
            for form, node, target in forms(source, node_at(source, code, lasti)):
                yield _splice(call.path, method, source, node, form, target)
        except SpliceError as error:
            yield error


def _splice(path: str, method: Method, source: Source, node: ast.AST, form: str, target: str = "") -> Edit:
    first, last, column, end = span_of(node)
    span = (first - source.first, last - source.first, column, end)
    owner = class_name(method.owner)
    return Edit(path, "splice", owner, method.name, span, form, target, digest=source.digest)


def _as_returned(path: str, module: nn.Module) -> Iterator[Edit | SpliceError]:
    """Yield ways to scale a module's whole output: where its forward returns it; in a forward that calls its own."""
    if isinstance(module, (fx.GraphModule, nn.ModuleList, nn.ModuleDict)):
        return
    if "forward" in vars(module):
        yield SpliceError(f"the forward of {path or 'the model'} is set on the instance, not by its class")
        return
    own = methods_of(type(module))
    method = next((m for m in own.values() if m.name == "forward"), None)
    if method is not None and method.self_name is not None:
        with suppress(SpliceError):
            source = source_of(method.function)
            returns = [r.value for r in own_nodes(source.tree) if isinstance(r, ast.Return) and r.value is not None]
            if len(returns) == 1:
                yield _splice(path, method, source, returns[0], "wrap")
    yield Edit(path, "return", digest=forward_digest(type(module)))


# Names ----------------------------------------------------------------------------------------------------------------


def named(edits: dict[Edit, str], model: nn.Module) -> dict[Edit, str]:
    """Return the path of the SE module for each edit; edits come with the path of their block."""
    modules = dict(model.named_modules())
    holders = {e: _beside(modules, e.holder, block) if e.form == "graph" else e.holder for e, block in edits.items()}
    name, number = SE_NAME, 1
    while any(has_attribute(modules[holder], name) for holder in holders.values()):  # until it is free in all modules
        number += 1
        name = f"{SE_NAME}{number}"
    counted: Counter[str] = Counter()
    paths: dict[Edit, str] = {}
    for edit, holder in holders.items():
        counted[holder] += 1
        own = name if counted[holder] == 1 else f"{name}_{counted[holder]}"
        paths[edit] = f"{holder}.{own}" if holder else own
    return paths


def _beside(modules: dict[str, nn.Module], root: str, block: str) -> str:
    """Return where SE goes in a GraphModule: beside the block's other modules, if they still have their own path."""
    holder = block
    if next(modules.get(block, modules[root]).children(), None) is None:
        holder = block.rpartition(".")[0]  # the unit of a chain is named after its convolution
    return holder if holder in modules and (not root or f"{holder}.".startswith(f"{root}.")) else root
