"""An additional call in the author's own source.

``out = self.bn3(out)`` becomes ``out = self.se_attention(self.bn3(out))`` in a class derived from the block's. The text is
changed at the expression's span and nothing is unparsed, so comments, layout and line numbers stay.
"""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import inspect
import linecache
import tokenize
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import RetrofitError
from ..record.methods import nested, remade, unwrapped

Span = tuple[int, ...]  # first line, last line (counted from the method's first), first column, end column


class SpliceError(RetrofitError):
    """Raised if a method's source can't be changed; the message says why, and mostly becomes the reason of a block."""


@dataclass(frozen=True)
class Splice:
    """An additional call in a method, according to an ``Edit``: the class that defines the method, the method's name,
    the change, and the name of the SE module, which is a child of the instance.

    The form ``"norm"`` has no edit: ``self.bn(x)`` becomes ``self.se(self.bn, x)``, and ``target`` is the norm.
    """

    owner: type
    method: str
    span: Span
    form: str
    child: str
    target: str = ""
    digest: str = ""


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """The text of a function as in its file, and its syntax tree with the positions in the file."""

    function: types.FunctionType
    lines: tuple[str, ...]
    first: int
    tree: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def self_name(self) -> str:
        return self.function.__code__.co_varnames[0]

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All nodes of the tree, outer ones first."""
        return tuple(ast.walk(self.tree))

    def text(self, node: ast.AST) -> str:
        a, b, c, d = span_of(node)
        lines = [line.encode() for line in self.lines[a - self.first : b - self.first + 1]]
        lines[-1] = lines[-1][:d]
        lines[0] = lines[0][c:]
        return b"".join(lines).decode()

    @functools.cached_property
    def spans(self) -> dict[Span, list[ast.AST]]:
        """The expressions and statements at each position, outer ones first."""
        found: dict[Span, list[ast.AST]] = {}
        for node in self.nodes:
            if isinstance(node, (ast.expr, ast.stmt)):
                found.setdefault(span_of(node), []).append(node)
        return found

    @functools.cached_property
    def structure(self) -> str:
        return ast.dump(self.tree)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256("".join(self.lines).encode()).hexdigest()[:16]


def own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of a tree, except those of nested functions and classes."""
    waiting = deque([tree])  # a long sum is deeper than Python's recursion goes
    while waiting:
        for node in ast.iter_child_nodes(waiting.popleft()):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
                yield node
                waiting.append(node)


@functools.lru_cache(maxsize=512)
def source_of(function: types.FunctionType) -> Source:
    """Return the source of a function; if there is none that it was compiled from, raise a SpliceError."""
    name = function.__qualname__
    if all(position[2] is None for position in function.__code__.co_positions()):
        raise SpliceError(
            "Python runs without the positions of expressions (-X no_debug_ranges or PYTHONNODEBUGRANGES); run it with them"
        )
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        raise SpliceError(f"the source of {name} is not at hand") from None
    try:
        tree = _parsed(lines, first)
        code = _compiled(tree, function)
    except (SyntaxError, ValueError, LookupError):
        raise SpliceError(f"the source of {name} can't be compiled on its own") from None
    if not _same_code(code, function.__code__):
        raise SpliceError(
            f"the source of {name} differs from the code that runs: its file was edited since its import, or an import hook rewrote it"
        )
    return Source(function, tuple(lines), first, tree)


def _parsed(lines: list[str], first: int) -> ast.FunctionDef | ast.AsyncFunctionDef:
    indented = lines[0][:1].isspace()
    head = "\n" * max(0, first - 2) + "class _:\n" if indented else "\n" * (first - 1)
    with_head = ast.parse(head + "".join(lines))
    node: Any = with_head.body[0]
    if indented:
        node = node.body[0]
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise ValueError("not a function")
    return node


def _compiled(
    tree: ast.FunctionDef | ast.AsyncFunctionDef, function: types.FunctionType, filename: str | None = None
) -> types.CodeType:
    """Return the code object of a method, compiled as in its place: with its closure and its class's private names."""
    code = function.__code__
    free = code.co_freevars
    parts = function.__qualname__.split(".")
    owner = parts[-2] if len(parts) > 1 and parts[-2] != "<locals>" else ""
    # a call of an attribute of an imported name (F.relu) compiles to other code than that of other names
    around = [f"import {name}" for name in sorted(_imported_in(code.co_filename))]
    around.append(f"def _factory({', '.join(free)}):")
    if owner and owner not in free:
        around.append(f"    global {owner}")
    around.append(f"    class {owner}: pass" if owner else "    pass")
    module: Any = ast.parse("\n".join(around))
    holder = module.body[-1].body[-1] if owner else module.body[-1]
    holder.body = [tree]
    flags = code.co_flags & _FUTURE
    compiled = compile(module, filename or code.co_filename, "exec", flags=flags, dont_inherit=True)
    at_its_line = (c for c in nested(compiled) if c.co_name == tree.name and c.co_firstlineno == code.co_firstlineno)
    return next(at_its_line, compiled)  # if the file was edited, another function may be there


@functools.lru_cache(maxsize=256)
def _imported_in(filename: str) -> frozenset[str]:
    """Return the names that a file imports outside functions and classes."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return frozenset()
    aliases = [a for n in own_nodes(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    return frozenset(a.asname or a.name.partition(".")[0] for a in aliases) - {"*"}


_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)  # a bit each


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    if a.replace(co_flags=b.co_flags) != b:  # one may be nested in a function, the other not
        return False
    return all(x.co_linetable == y.co_linetable for x, y in zip((a, *nested(a)), (b, *nested(b)), strict=True))


def span_of(node: Any) -> Span:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def node_at(source: Source, code: types.CodeType, lasti: int) -> ast.AST:
    """Return the expression, or the augmented assignment, that a frame was executing."""
    position = _positions(code)[lasti // 2]
    if None in position:
        raise SpliceError("the position of the expression is not known")
    _, end_line, _, end_column = position
    for node in source.spans.get(position, ()):
        if isinstance(node, (ast.expr, ast.AugAssign)):
            return node
    for node in source.nodes:  # for a chain of calls over several lines, Python stores the position of the last
        if isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) == (end_line, end_column):
            return node
    raise SpliceError("the position of the expression is not known")


@functools.lru_cache(maxsize=4096)
def _positions(code: types.CodeType) -> list[tuple[Any, ...]]:
    return list(code.co_positions())


# Writing --------------------------------------------------------------------------------------------------------------


def spliced_members(base: type, splices: tuple[Splice, ...]) -> tuple[dict[str, Any], dict[type, dict[str, Any]]]:
    """Return the members of a class derived from ``base``: those that replace its own, and, by class, those of base
    classes that its methods reach by ``super()``."""
    own: dict[str, Any] = {}
    further: dict[type, dict[str, Any]] = {}
    by_method: dict[tuple[type, str], list[Splice]] = {}
    for splice in splices:
        by_method.setdefault((splice.owner, splice.method), []).append(splice)
    for (owner, name), group in by_method.items():
        member = vars(owner).get(name)
        function: Any = unwrapped(member)
        new = _rewrapped(member, function, _respliced(function, group))
        first = next(c for c in base.__mro__ if name in vars(c))
        (own if first is owner else further.setdefault(owner, {}))[name] = new
    return own, further


def _respliced(function: types.FunctionType, splices: list[Splice]) -> types.FunctionType:
    source = source_of(function)
    lines = [line.encode() for line in source.lines]
    for row, column, text in sorted(_insertions(splices, source.self_name), key=lambda item: item[:2], reverse=True):
        lines[row] = lines[row][:column] + text.encode() + lines[row][column:]
    new_lines = b"".join(lines).decode().splitlines(keepends=True)
    digest = hashlib.sha256("".join(new_lines).encode()).hexdigest()[:12]
    filename = f"<se_retrofit {function.__module__}.{function.__qualname__} {digest}>"
    whole = ["\n"] * (source.first - 1) + new_lines
    try:
        tree = _parsed(new_lines, source.first)
        code = _compiled(tree, function, filename)
    except (SyntaxError, ValueError) as error:
        raise SpliceError(f"the changed source of {function.__qualname__} does not compile: {error}") from None
    without = _WithoutCalls(source.self_name, {splice.child for splice in splices}).visit(tree)
    # fails for an expression in an f-string, say, whose exact position Python does not have
    if ast.dump(without) != source.structure:
        raise SpliceError(f"a call of SE can't be put at the expression in {function.__qualname__}")
    linecache.cache[filename] = (sum(map(len, whole)), None, whole, filename)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return remade(function, code, [cells[name] for name in code.co_freevars])


class _WithoutCalls(ast.NodeTransformer):
    def __init__(self, self_name: str, children: set[str]) -> None:
        self.self_name, self.children = self_name, children

    def is_se(self, node: ast.AST) -> bool:
        called: Any = node.func if isinstance(node, ast.Call) else None
        own = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
        return own and called.value.id == self.self_name and called.attr in self.children

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not self.is_se(node):
            return self.generic_visit(node)
        if len(node.args) == 2:  # the norm and its argument
            return self.visit(ast.Call(func=node.args[0], args=node.args[1:], keywords=[]))
        return self.visit(node.args[0])

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        value: Any = node.value
        if self.is_se(value) and ast.unparse(value.args[0]) == ast.unparse(node.targets[0]):
            return None  # a separate statement
        return self.generic_visit(node)


def _insertions(splices: list[Splice], self_name: str) -> Iterator[tuple[int, int, str]]:
    # of two expressions with the same start, the inner one's call is inserted first, so that the outer's precedes it
    for splice in sorted(splices, key=lambda s: (s.span[1] - s.span[0], s.span[3] - s.span[2])):
        first, last, column, end = splice.span
        call = f"{self_name}.{splice.child}("
        if splice.form == "wrap":
            yield last, end, ")"
            yield first, column, call
        elif splice.form == "norm":  # self.bn3(out) becomes self.se_attention(self.bn3, (out))
            yield last, end, ")"
            yield first, column + len(splice.target.encode()), ", "
            yield first, column, call
        elif splice.form == "after":
            yield last, end, f"; {splice.target} = {call}{splice.target})"
        else:
            yield first, column, f"{splice.target} = {call}{splice.target}); "


def _rewrapped(
    member: Any, old: types.FunctionType, new: types.FunctionType, made: dict[int, types.FunctionType] | None = None
) -> Any:
    """Repeat the decoration of a function for another function. ``made`` holds the wrappers that are already rebuilt,
    by the ids of the original ones, because a wrapper may refer to itself."""
    made = {} if made is None else made
    if member is old:
        return new
    if id(member) in made:
        return made[id(member)]
    if isinstance(member, (staticmethod, classmethod)):
        return type(member)(_rewrapped(member.__func__, old, new, made))
    if isinstance(member, property):
        return property(_rewrapped(member.fget, old, new, made), member.fset, member.fdel, member.__doc__)
    if isinstance(member, types.FunctionType):
        cells, replaced = [], []
        for cell in member.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                content = None
            if callable(content) and unwrapped(content) is old:
                cell = types.CellType()
                replaced.append((cell, content))
            cells.append(cell)
        if any(content is not member for _, content in replaced):
            wrapper = made[id(member)] = remade(member, member.__code__, cells)
            for cell, content in replaced:
                cell.cell_contents = _rewrapped(content, old, new, made)
            wrapper.__wrapped__ = _rewrapped(member.__wrapped__, old, new, made)  # type: ignore[attr-defined]
            return wrapper
    raise SpliceError(f"{old.__qualname__} is decorated in a way that can't be repeated")
