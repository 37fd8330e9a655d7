"""Classes derived from those of blocks, which call SE, and whose instances can be copied and pickled."""

from __future__ import annotations

import collections
import copy
import inspect
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import RetrofitError
from ..record.isolation import isolated
from ..record.methods import unwrapped
from .source import Source, Splice, SpliceError, source_of, spliced_members


@dataclass(frozen=True)
class Recipe:
    """How a class is derived: by splices into its methods, or, if there are none, by passing the result of its forward
    through ``returned``.

    Attributes:
        base: the original class of the block.
        splices: the calls of SE inserted into its methods.
        returned: name of the SE module that scales the module's output; empty if there are splices.
    """

    base: type
    splices: tuple[Splice, ...] = ()
    returned: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the SE modules that the class calls."""
        return tuple(dict.fromkeys([s.child for s in self.splices] + [self.returned] * bool(self.returned)))


class _Quiet:
    """Mixin for derived classes, which keeps them out of registries that are filled when a class is defined."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class RetrofittedBlock(_Quiet):
    """Mixin for the class of each module whose code calls SE."""

    se_recipe: Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce the block without SE like the author's class does; the SE modules are added to its state."""
        if "se_recipe" not in vars(type(self)):  # something has derived a class from ours, and is responsible
            return super().__reduce_ex__(protocol)
        recipe, children = type(self).se_recipe, vars(self)["_modules"]
        reduced = _without_se(self).__reduce_ex__(protocol)
        if not isinstance(reduced, tuple):
            return reduced
        function, arguments, state, *rest = (*reduced, None) if len(reduced) == 2 else reduced
        ses = {name: children[name] for name in recipe.names if name in children}
        return _revive, (recipe, function, arguments), _State(state, ses, tuple(children)), *rest

    def __setstate__(self, given: Any) -> None:
        cls = type(self)
        if not isinstance(given, _State):  # from a class that something has derived from ours
            super().__setstate__(given)  # type: ignore[misc]
            return
        if given.state is not None:
            object.__setattr__(self, "__class__", cls.se_recipe.base)
            self.__setstate__(given.state)
            object.__setattr__(self, "__class__", cls)
        children = vars(self)["_modules"]
        children.update(given.ses)
        for name in given.order:  # the state dict is in this order
            if name in children:
                children[name] = children.pop(name)


def class_before(module: nn.Module) -> type:
    return type(module).se_recipe.base if isinstance(module, RetrofittedBlock) else type(module)


class _State(NamedTuple):
    """The state of a retrofitted block: what its own class saves, its SE modules, and the order of its children."""

    state: Any
    ses: dict[str, nn.Module]
    order: tuple[str, ...]


def _without_se(block: Any) -> nn.Module:
    """Return the original block, which shares everything except SE with the retrofitted one."""
    recipe = type(block).se_recipe
    children = {name: child for name, child in block._modules.items() if name not in recipe.names}
    return _bare(recipe.base, {**vars(block), "_modules": children})


def _bare(cls: type, attributes: dict[str, Any]) -> nn.Module:
    bare: nn.Module = object.__new__(cls)
    vars(bare).update(attributes)
    return bare


def _deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a block whose base defines ``__deepcopy__``: the base copies the block without SE; SE is added as a copy."""
    recipe: Recipe = type(self).se_recipe  # type: ignore[attr-defined]
    bare = _without_se(self)
    memo.setdefault(id(memo), []).append(bare)  # kept alive as long as the memo, which refers to it by id
    new = recipe.base.__deepcopy__(bare, memo)  # type: ignore[attr-defined]
    if new is bare:
        return self
    for name in recipe.names:
        new._modules[name] = copy.deepcopy(self._modules[name], memo)
    object.__setattr__(new, "__class__", type(self))
    memo[id(self)] = new
    return new


def _revive(recipe: Recipe, function: Any, arguments: tuple[Any, ...]) -> Any:
    cls = derived_class(recipe)
    instance = function(*arguments)
    object.__setattr__(instance, "__class__", cls)
    return instance


_derived: weakref.WeakValueDictionary[Recipe, type] = weakref.WeakValueDictionary()
_recent: collections.deque[type] = collections.deque(maxlen=128)  # a plan is usually carried out soon after it was made


def derived_class(recipe: Recipe) -> type:
    """Return the class of a recipe; equal recipes give the same class. If it can't be derived, raise a SpliceError."""
    cls = _derived.get(recipe)
    if cls is None:
        for splice in recipe.splices:  # a pickle may come from another version
            try:
                source_as_before(splice)
            except SpliceError as error:
                raise RetrofitError(
                    f"{recipe.base.__qualname__} can't be retrofitted as before: {error}. Install the version that was used; or build "
                    "the network again, retrofit it, and load the state dict"
                ) from None
        bare = _bare(recipe.base, {"_modules": {}})
        with isolated(bare):  # deriving a class may fill a registry
            cls = _derived[recipe] = _derive(recipe)
        _recent.append(cls)
    return cls


def source_as_before(splice: Splice) -> Source:
    """Return the source of the method that a splice is for; if it is no longer the same, raise a SpliceError."""
    function = unwrapped(vars(splice.owner).get(splice.method))
    source = None if function is None else source_of(function)
    if source is None or source.digest != splice.digest:
        raise SpliceError(
            f"the source of {splice.owner.__module__}.{splice.owner.__qualname__}.{splice.method} has changed (another version "
            "of its library, say)"
        )
    return source


def _derive(recipe: Recipe) -> type:
    base = recipe.base
    if recipe.splices:
        members, further = spliced_members(base, recipe.splices)
    else:
        members, further = {"forward": _returning_through(base, recipe.returned)}, {}
    if hasattr(base, "__deepcopy__"):
        members["__deepcopy__"] = _deep_copy
    between = []
    try:
        for owner, replaced in further.items():
            between.append(type(owner)(f"SE{owner.__name__}", (_Quiet, owner), {**_names(owner), **replaced}))
        namespace = {**_names(base), "__doc__": base.__doc__, **members, "se_recipe": recipe}
        metaclass: Any = type(base)
        derived: type = metaclass(f"SE{base.__name__}", (RetrofittedBlock, base, *between), namespace)
    except Exception as error:
        raise SpliceError(f"can't derive a class from {base.__qualname__}: {type(error).__name__}: {error}") from None
    for member in members.values():
        _keep_overloads(member, base, derived)
    return derived


def _names(cls: type) -> dict[str, Any]:
    """Return the attributes by which a class is found, in its module and in its source."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if (line := vars(cls).get("__firstlineno__")) is not None:  # by which Python 3.13 finds the source for TorchScript
        names["__firstlineno__"] = line
    return names


def _keep_overloads(member: Any, base: type, derived: type) -> None:
    """Copy the overloads of a method (as in torchvision's DenseNet), which TorchScript stores by the class name."""
    registered = getattr(torch._jit_internal, "_overloaded_methods", {})
    function = unwrapped(member)
    if function is not None and registered:
        by_class = registered.get(torch._jit_internal._qualified_name(function), {})
        if base.__name__ in by_class:
            by_class[derived.__name__] = by_class[base.__name__]


def _returning_through(base: type, child: str) -> Any:
    """Return a forward that calls the base's and passes the result through SE, for a class without available source."""
    inherited: Any = base.forward  # type: ignore[attr-defined]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, child)(inherited(self, *args, **kwargs))

    forward.__doc__, forward.__qualname__ = inherited.__doc__, f"SE{base.__qualname__}.forward"
    with suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(inherited)  # type: ignore[attr-defined]
    return forward
