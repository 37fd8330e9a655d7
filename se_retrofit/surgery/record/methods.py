"""The methods of a class, by their code objects."""

from __future__ import annotations

import types
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
                _add_code(found, function.__code__, Method(owner, name, function))
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


def _add_code(found: dict[types.CodeType, Method], code: types.CodeType, method: Method) -> None:
    found.setdefault(code, method)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(found, constant, method)
