"""Running a copy of a model without side effects outside it.

A forward may draw random numbers, fill a cache in its module, or count its calls on its class. None of that may remain
after a recording: random states, registries, caches and counters are restored.
"""

from __future__ import annotations

import gc
import random
import sys
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import _lru_cache_wrapper, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .methods import unwrapped

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


@contextmanager
def forked_randomness() -> Iterator[None]:
    """Seed the global random generators of torch, NumPy and Python, always the same way, and restore them on exit."""
    with _disable_current_modes():  # a FakeTensorMode of the caller's rejects real tensors, which states are
        python, numpy, cpu = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of all devices
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with _disable_current_modes():
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


@contextmanager
def without_collections() -> Iterator[None]:
    """Postpone the collection of cyclic garbage. A record consists of some hundred thousand small objects that all stay
    alive; scanning them again and again, and all of torch, took a third of the surgery's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def isolated(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore the modules and classes that contain a model's code, and the warning filters, on exit. The provided
    function restores them at once, so that one run does not see the effects of another."""
    saved = _SavedState(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield saved.restore
    finally:
        saved.restore()


class _SavedState:
    """The contents of the modules and classes of a model's code, to restore where a run has changed them."""

    def __init__(self, model: nn.Module) -> None:
        classes = {cls for own in {type(m) for m in model.modules()} for cls in own.__mro__}
        classes = {cls for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins")}
        # the current and the saved contents of each scope, and how to set and delete a name in it
        self.scopes: list[tuple[Any, dict[str, Any], Any, Any]] = [
            (names, dict(names), names.__setitem__, names.__delitem__) for names in _namespaces(classes)
        ]
        self.scopes += [(vars(c), dict(vars(c)), partial(setattr, c), partial(delattr, c)) for c in classes]
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.caches: dict[Any, int] = {}  # each with its number of misses: a full cache never changes its size
        for _, saved, _, _ in self.scopes:
            for name, value in saved.items():
                if name != "__builtins__":
                    self._save(value, 2)

    def _save(self, value: Any, depth: int) -> None:
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if type(value) in _CONTAINERS:  # a user's container class may do anything when it is read
            if id(value) in self.containers or len(value) > 10_000:
                return
            self.containers[id(value)] = (value, value.copy())
            for item in (value.values() if isinstance(value, dict) else value) if depth else ():
                self._save(item, depth - 1)
        elif isinstance(value, types.FunctionType):
            for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self._save(default, 1)
            for cell in (value.__closure__ or ()) if depth else ():
                with suppress(ValueError):  # an empty cell
                    self._save(cell.cell_contents, 0)
        elif isinstance(value, _lru_cache_wrapper):
            self.caches[value] = value.cache_info().misses
        elif isinstance(value, type) and depth == 2 and not str(value.__module__).startswith("torch."):
            # a helper that is not a module: its methods may be cached
            own = [m.__func__ if isinstance(m, (staticmethod, classmethod)) else m for m in vars(value).values()]
            self.caches |= {m: m.cache_info().misses for m in own if isinstance(m, _lru_cache_wrapper)}

    def restore(self) -> None:
        for scope, saved, put, delete in self.scopes:
            for name in [n for n in scope if n not in saved]:
                if not isinstance(scope[name], types.ModuleType):  # an import inside a function stays
                    delete(name)
            for name, value in saved.items():
                if scope.get(name, scope) is not value:
                    put(name, value)
        for value, saved in self.containers.values():
            if _ids(value) != _ids(saved):
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(saved)
        for cached, misses in self.caches.items():
            if cached.cache_info().misses != misses:
                cached.cache_clear()
                self.caches[cached] = 0


def _ids(container: Any) -> list[int]:
    items = [x for pair in container.items() for x in pair] if isinstance(container, dict) else container
    return [id(item) for item in items]


def _namespaces(classes: set[type]) -> list[dict[str, Any]]:
    """Return the globals of the modules in which classes and their methods are defined, except torch's own."""
    found = [vars(sys.modules[cls.__module__]) for cls in classes if cls.__module__ in sys.modules]
    for function in (unwrapped(member) for cls in classes for member in vars(cls).values()):
        if function is not None and not str(function.__module__).startswith("torch."):
            found.append(function.__globals__)
    return list({id(names): names for names in found}.values())
