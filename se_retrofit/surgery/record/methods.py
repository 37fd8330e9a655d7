"""The methods of a class, by their code objects."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class Method:
    """A method of a class: the class that defines it, its name there, the function without its decorators."""

    owner: type
    name: str
    function: types.FunctionType

    @property
    def self_name(self) -> str | None:
        code = self.function.__code__
        static = isinstance(vars(self.owner).get(self.name), staticmethod)
        return code.co_varnames[0] if code.co_argcount and not static else None


# by class; emptied before each planning, because methods may be patched
METHODS: dict[type, dict[types.CodeType, Method]] = {}


def methods_of(cls: type) -> dict[types.CodeType, Method]:
    """Return the methods of a class and its bases, by their code objects and by those nested in them."""
    if cls in METHODS:
        return METHODS[cls]
    found = METHODS[cls] = {}
    for owner in cls.__mro__:
        if owner in (object, nn.Module):
            continue
        for name, member in vars(owner).items():
            function = unwrapped(member)
            if function is not None:
                method = Method(owner, name, function)
                for code in (function.__code__, *nested(function.__code__)):
                    found.setdefault(code, method)
    return found


def unwrapped(member: Any) -> types.FunctionType | None:
    """Return the function of a class member: of a method, a property or a decorated function."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    for _ in range(100):
        # __getattr__ is not called: it may answer to every name, or raise
        inner = None if isinstance(member, type) else getattr(member, "__dict__", {}).get("__wrapped__")
        if inner is None:
            break
        member = inner
    return member if isinstance(member, types.FunctionType) else None


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from nested(constant)


def remade(function: types.FunctionType, code: types.CodeType, cells: Iterable[types.CellType]) -> types.FunctionType:
    """Return the same function with other code, or another closure."""
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    new.__kwdefaults__ = function.__kwdefaults__
    new.__annotations__ = dict(function.__annotations__)
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(new).update(vars(function))
    return new
