"""The methods of a class, by the code objects that run."""

from __future__ import annotations

import types
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Method", "forget_methods", "methods_of", "unwrapped"]


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
_methods: weakref.WeakKeyDictionary[type, dict[types.CodeType, Method]] = weakref.WeakKeyDictionary()


def forget_methods() -> None:
    """Look at the classes anew."""
    _methods.clear()


def methods_of(cls: type) -> dict[types.CodeType, Method]:
    """The methods of a class and of those it is derived from, by their code objects and by those nested in them."""
    if cls in _methods:
        return _methods[cls]
    found: dict[types.CodeType, Method] = {}
    for owner in cls.__mro__:
        if owner in (object, nn.Module):
            continue
        for name, member in vars(owner).items():
            function = unwrapped(member)
            if function is not None:
                _add_code(found, function.__code__, Method(owner, name, function))
    _methods[cls] = found
    return found


def unwrapped(member: Any) -> types.FunctionType | None:
    """The function behind a member of a class: a method's, a property's, a decorated one's."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    elif isinstance(member, property):
        member = member.fget
    seen = 0
    while not isinstance(member, type) and seen < 100:
        inner, seen = _wrapped(member), seen + 1
        if inner is None:
            break
        member = inner
    return member if isinstance(member, types.FunctionType) else None


def _wrapped(member: Any) -> Any:
    """What a decorator keeps of what it wraps. A ``__getattr__`` is not asked: it may have an answer to everything, or raise."""
    try:
        return vars(member).get("__wrapped__")
    except Exception:
        return None


def _add_code(found: dict[types.CodeType, Method], code: types.CodeType, method: Method) -> None:
    found.setdefault(code, method)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(found, constant, method)
