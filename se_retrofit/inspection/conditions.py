"""Conditions on a report's totals, such as ``sites < 16``: Python's arithmetic, comparisons and ``and``, ``or``, ``not`` on
numbers and names. They are read by walking Python's syntax tree; nothing is ever evaluated as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RetrofitError

__all__ = ["Condition", "WrongExpression"]

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_LONGEST = 300


class WrongExpression(RetrofitError):
    """An expression that is no condition on the totals."""


@dataclass(frozen=True)
class Condition:
    """A condition that was read.

    Attributes:
        text: as it was given.
        names: the totals that it is about.

    Example:
        >>> from se_retrofit.inspection.conditions import Condition
        >>> condition = Condition.read("parameters_after > 1.1 * parameters_before", ["parameters_before", "parameters_after"])
        >>> condition.holds({"parameters_before": 100, "parameters_after": 105})
        False
    """

    text: str
    names: tuple[str, ...]
    tree: ast.expr

    @classmethod
    def read(cls, text: str, names: Collection[str]) -> Condition:
        """Read a condition on numbers of these names.

        Raises:
            WrongExpression: it is none; the message says what is wrong, and which names there are.
        """
        if len(text) > _LONGEST:
            raise WrongExpression(f"the condition has {len(text)} characters; at most {_LONGEST} are read")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            message = error.msg if isinstance(error, SyntaxError) else str(error)
            raise WrongExpression(f"{text!r} can't be read ({message}); write it like 'sites < 16'") from None
        used: dict[str, None] = {}
        if not _Reader(text, names, used).is_condition(tree):
            raise WrongExpression(f"{text!r} is a number and no condition; compare it, as in 'sites < 16'")
        return cls(text, tuple(used), tree)

    def holds(self, totals: Mapping[str, float | None]) -> bool:
        """Whether it holds for these totals.

        Raises:
            RetrofitError: a total that it is about is not known.
            WrongExpression: it divides by zero.
        """
        unknown = [name for name in self.names if totals[name] is None]
        if unknown:
            raise RetrofitError(f"{self.text!r} can't be told: {', '.join(unknown)} of this network is not known")
        try:
            return bool(_value(self.tree, totals))
        except ZeroDivisionError:
            raise WrongExpression(f"{self.text!r} divides by zero for {self.told(totals)}") from None

    def told(self, totals: Mapping[str, float | None]) -> str:
        """The totals that it is about, in words."""
        return ", ".join(f"{name} = {totals[name]:,}" for name in self.names) or "any network"


@dataclass
class _Reader:
    text: str
    names: Collection[str]
    used: dict[str, None]

    def is_condition(self, tree: ast.expr) -> bool:
        """Whether a tree is a condition; False if it is a number. Raises if it is neither."""
        match tree:
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
                self.want(False, left, *others)
                return True
            case ast.BoolOp(values=values):
                self.want(True, *values)
                return True
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self.want(True, operand)
                return True
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                self.want(False, left, right)
                return False
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                self.want(False, operand)
                return False
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return False
            case ast.Name(id=name):
                if name not in self.names:
                    raise WrongExpression(f"no total {name!r} in {self.text!r}; there are {', '.join(self.names)}")
                self.used[name] = None
                return False
        raise WrongExpression(
            f"{ast.unparse(tree)!r} in {self.text!r} is not understood; there are numbers, names, + - * /, < <= > >= == != "
            "and the words and, or, not"
        )

    def want(self, condition: bool, *trees: ast.expr) -> None:
        for tree in trees:
            if self.is_condition(tree) != condition:
                found, wanted = ("a number", "a condition") if condition else ("a condition", "a number")
                raise WrongExpression(f"{ast.unparse(tree)!r} in {self.text!r} is {found}; {wanted} is expected there")


def _value(tree: ast.expr, totals: Mapping[str, Any]) -> Any:
    match tree:
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(part, totals) for part in (left, *others)]
            pairs = zip(ops, values[:-1], values[1:], strict=True)
            return all(_COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(_value(part, totals) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, totals)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, totals)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, totals), _value(right, totals))
        case ast.Name(id=name):
            return totals[name]
        case ast.Constant(value=value):
            return value
    raise AssertionError(ast.dump(tree))
