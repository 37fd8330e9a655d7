"""Classes derived from those of blocks, whose forward has SE in it, and whose instances pickle."""

from __future__ import annotations

import linecache
from typing import Any

import torch
from torch import nn

__all__ = ["RetrofittedBlock", "derive_class", "subclass"]


class RetrofittedBlock:
    """Mixed into the class of each module whose forward has SE in it.

    Instances pickle and copy: the derived class is rebuilt from its base and its source.
    """

    se_base: type[nn.Module]
    se_source: str
    se_names: tuple[str, ...]
    se_how: str
    se_kind: str
    se_placement: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        state = super().__reduce_ex__(protocol)[2]
        recipe = (cls.se_base, cls.se_source, cls.se_names, cls.se_how, cls.se_kind, cls.se_placement)
        return _revive, recipe, state

    def __setattr__(self, name: str, value: Any) -> None:
        if self.se_how == "rewrite" and self._decides(name, value):
            super().__setattr__(name, value)
            following.mark_changed(self)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if self.se_how == "rewrite" and name not in self.se_names:
            following.mark_changed(self)

    def se_another_way(self, *args: Any, **kwargs: Any) -> Any:
        """A call whose like was not traced yet: trace it, and go its way."""
        return following.go_another_way(self, args, kwargs)

    def _decides(self, name: str, value: Any) -> bool:
        """Whether the forward may go another way once ``name`` is ``value``: the code was generated for what it was."""
        if name == "training" or name.startswith("_") or name in self.se_names:
            return False
        old = getattr(self, name, _ABSENT)
        if old is _ABSENT:
            return False
        if isinstance(old, (nn.Module, torch.Tensor)) and isinstance(value, (nn.Module, torch.Tensor)):
            return False  # called or read by its name, whatever it is
        if old is value or type(old) is not type(value):
            return old is not value
        try:
            return bool(old != value)
        except (ValueError, RuntimeError):  # arrays or tensors, which have no one answer
            return True


_ABSENT = object()
_derived: dict[tuple[Any, ...], type[nn.Module]] = {}


def derive_class(
    base: type[nn.Module], source: str, names: tuple[str, ...], how: str, kind: str, placement: str
) -> type[nn.Module]:
    """The class derived from ``base`` whose forward is ``source``; the same for the same arguments."""
    key = (base, source, names, how, kind, placement)
    if key not in _derived:
        filename = f"<se_retrofit {base.__module__}.{base.__qualname__} {len(_derived)}>"
        # so that tracebacks and inspect.getsource show the generated code
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope: dict[str, Any] = {"torch": torch, "Base": base, "__name__": __name__}
        exec(compile(source, filename, "exec"), scope)
        forward = scope["forward"]
        forward.__qualname__ = f"SE{base.__name__}.forward"
        forward.__doc__ = base.forward.__doc__
        forward.__annotations__ = dict(getattr(base.forward, "__annotations__", {}))
        _derived[key] = subclass(base, {"forward": forward}, key)
    return _derived[key]


def subclass(base: type[nn.Module], members: dict[str, Any], key: tuple[Any, ...]) -> type[nn.Module]:
    _, source, names, how, kind, placement = key
    namespace = {
        **members,
        "__module__": __name__,
        "__doc__": base.__doc__,
        "se_base": base,
        "se_source": source,
        "se_names": names,
        "se_how": how,
        "se_kind": kind,
        "se_placement": placement,
    }
    metaclass: Any = type(base)
    derived: type[nn.Module] = metaclass(f"SE{base.__name__}", (RetrofittedBlock, base), namespace)
    return derived


def _revive(*recipe: Any) -> nn.Module:
    cls = derive_class(*recipe)
    return cls.__new__(cls)


from . import following  # noqa: E402  (it reads blocks anew, and so needs all that is above)
