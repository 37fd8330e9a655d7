"""Running a copy of a model without leaving a trace outside of it.

A forward may draw random numbers, fill a cache in its module, count its calls on its class. None of that may be seen
after a recording: registries, caches and counters are put back, and random numbers come from generators of our own, so
that no generator has to be set back behind the back of another thread.
"""

from __future__ import annotations

import functools
import gc
import random
import sys
import threading
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .methods import unwrapped

__all__ = ["PrivateRandomness", "isolated", "untouched_randomness", "without_collections"]


@contextmanager
def isolated(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave the modules and classes that a model's code lives in, and the warning filters, as they are. What it gives puts
    them back at once, so that one run does not see what another has left."""
    saved = _SavedState(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield saved.restore
    finally:
        saved.restore()


@contextmanager
def without_collections() -> Iterator[None]:
    """Put off the collection of cyclic garbage. A record is made of some hundred thousand small objects that all stay; to look
    through them again and again, and through all of torch, took a third of the surgery's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Let torch's operations draw from a generator of our own, and set the global ones back, as far as no other thread can
    have drawn from them."""
    before, alone = _global_states(), threading.active_count() == 1
    try:
        with _OwnDraws():
            yield
    finally:
        _set_back(before, alone)


# Random numbers -------------------------------------------------------------------------------------------------------


class PrivateRandomness:
    """Random numbers from states of our own, equal at each start.

    torch's operations are given their generator by the recorder (``generator``). Python's and NumPy's global generators
    are C objects that can't be replaced; while the model's code draws from one (``sys.setprofile`` tells), it holds our
    state, and right afterwards its own again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.watched = _uses_global_generators(model)
        self.numpy_is_ours = self.watched and _names_numpys_random(model)
        self.python = random.Random(0).getstate()
        self.numpy = np.random.RandomState(0).get_state(legacy=False)
        self._outside: Any = None

    def __enter__(self) -> PrivateRandomness:
        self.before = _global_states()
        self.alone = threading.active_count() == 1
        self.profiler = sys.getprofile()
        if self.watched:
            sys.setprofile(self._listen)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.watched:
            sys.setprofile(self.profiler)
        _set_back(self.before, self.alone, self.numpy_is_ours)

    def draw(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of ATen that draws random numbers, with our generator."""
        return _draw(function, args, kwargs, self.generator)

    def _listen(self, frame: types.FrameType, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return", "c_exception"):
            return
        owner = getattr(function, "__self__", None)
        if owner is _PYTHON:
            if event == "c_call":
                self._outside = random.Random.getstate(owner)
                random.Random.setstate(owner, self.python)
            else:
                self.python = random.Random.getstate(owner)
                random.Random.setstate(owner, self._outside)
        elif owner is _NUMPY:
            if event == "c_call":
                self._outside = _NUMPY_STATE(legacy=False)
                _SET_NUMPY_STATE(self.numpy)
            else:
                self.numpy = _NUMPY_STATE(legacy=False)
                _SET_NUMPY_STATE(self._outside)


@functools.cache
def _with_generator(function: Any) -> Any:
    """The overload of an operation that takes a generator, if it has one."""
    packet, name = function.overloadpacket, function._overloadname
    for candidate in (name, f"{name}_generator", "generator"):
        if candidate in packet.overloads():
            overload = getattr(packet, candidate)
            before = [a.name for a in function._schema.arguments if a.name != "generator"]
            after = [a.name for a in overload._schema.arguments if a.name != "generator"]
            if before == after and len(overload._schema.arguments) > len(after):
                return overload
    return None


_PYTHON: Any = vars(random)["_inst"]
_NUMPY: Any = np.random.mtrand._rand
_NUMPY_STATE, _SET_NUMPY_STATE = _NUMPY.get_state, _NUMPY.set_state


def _draw(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generator: torch.Generator) -> Any:
    """Run an operation of ATen that draws random numbers on the CPU, with this generator."""
    if kwargs.get("generator") is None and str(kwargs.get("device", "cpu")) != "meta":
        overload = _with_generator(function)
        if overload is not None:
            return overload(*args, **{**kwargs, "generator": generator})
        outside = torch.get_rng_state()
        torch.set_rng_state(generator.get_state())
        try:
            return function(*args, **kwargs)
        finally:
            generator.set_state(torch.get_rng_state())
            torch.set_rng_state(outside)
    return function(*args, **kwargs)


class _OwnDraws(TorchDispatchMode):
    """While it is active, what this thread draws on the CPU comes from a generator of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_cpu = all(t.device.type == "cpu" for t in tensors) and str(kwargs.get("device") or "cpu") == "cpu"
        if torch.Tag.nondeterministic_seeded in func.tags and on_cpu:
            return _draw(func, args, kwargs, self.generator)
        return func(*args, **kwargs)


def _global_states() -> tuple[Any, ...]:
    with _disable_current_modes():
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.initial_seed()


def _set_back(before: tuple[Any, ...], alone: bool, numpy_is_ours: bool = False) -> None:
    """What a forward did to the generators all the same: it seeded torch's, or drew by way of code that we don't know.
    With other threads about, a state that moved is theirs."""
    python, numpy, state, seed = before
    now: Any
    with _disable_current_modes():  # a FakeTensorMode of the caller's takes no real tensors, and states are such
        if torch.initial_seed() != seed or (alone and not torch.equal(torch.get_rng_state(), state)):
            torch.default_generator.manual_seed(seed)
            torch.set_rng_state(state)
    if alone and random.getstate() != python:
        random.setstate(python)
    if alone or numpy_is_ours:  # calls of NumPy's generator are not told to sys.setprofile
        now = np.random.get_state()
        if now[2:] != numpy[2:] or not np.array_equal(now[1], numpy[1]):
            np.random.set_state(numpy)


def _names_numpys_random(model: nn.Module) -> bool:
    """Whether a function or a method of the model's code takes ``random`` from something."""
    own = [cls for cls in _classes(model) if not cls.__module__.startswith("torch.")]
    methods = [f for cls in own for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    called = {name for f in methods for name in f.__code__.co_names}
    helpers = [scope[name] for scope in _namespaces(model) for name in called & scope.keys()]
    functions = [*methods, *(f for f in helpers if isinstance(f, types.FunctionType))]
    return any("random" in f.__code__.co_names for f in functions)


def _bound_to(value: Any) -> Any:
    """The object whose method a value is."""
    with suppress(Exception):  # what stands for a library that is not installed raises whatever it is asked
        return getattr(value, "__self__", None)
    return None


def _uses_global_generators(model: nn.Module) -> bool:
    """Whether the code of a model's classes can reach Python's or NumPy's global generator."""
    for scope in _namespaces(model):
        for value in scope.values():
            if value is random or value is np or value is np.random:
                return True
            if _bound_to(value) is _PYTHON or _bound_to(value) is _NUMPY:
                return True
            if (
                isinstance(value, types.ModuleType)
                and _is_foreign(value.__name__)
                and (
                    vars(value).get("random") is random or vars(value).get("np") is np or vars(value).get("numpy") is np
                )
            ):
                return True
    return False


# Modules and classes --------------------------------------------------------------------------------------------------

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_LIBRARIES = ("torch", "torchvision", "numpy", "builtins", "collections", "typing", "timm", "math", "functools")


def _is_foreign(name: str) -> bool:
    """Whether a module is the user's own, or of a library of which we know nothing."""
    return name.partition(".")[0] not in _LIBRARIES


def _classes(model: nn.Module) -> set[type]:
    """The classes of a model's modules, and those that they are derived from."""
    return {cls for own in {type(module) for module in model.modules()} for cls in own.__mro__}


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """The globals of all modules in which a class of the model is defined; torch's own are left out."""
    found: dict[int, dict[str, Any]] = {}
    for cls in _classes(model):
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        module = sys.modules.get(cls.__module__)
        if module is not None:
            found[id(vars(module))] = vars(module)
        for member in vars(cls).values():
            function = unwrapped(member)
            if function is not None and not str(function.__module__).startswith("torch."):
                found[id(function.__globals__)] = function.__globals__
    return list(found.values())


class _SavedState:
    """What stands in the modules and classes of a model's code, to be put back where a run has changed it."""

    def __init__(self, model: nn.Module) -> None:
        self.namespaces = [(scope, dict(scope)) for scope in _namespaces(model)]
        self.classes = [
            (cls, dict(vars(cls)))
            for cls in _classes(model)
            if cls.__module__.partition(".")[0] not in ("torch", "builtins")
        ]
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.generators: dict[int, tuple[Any, Any]] = {}
        self.caches: list[tuple[Any, int]] = []
        for _, saved in (*self.namespaces, *self.classes):
            for name, value in saved.items():
                if name != "__builtins__":
                    self._save(value, 2)

    def _save(self, value: Any, depth: int) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if type(value) in _CONTAINERS:  # one of a class of the user's may do anything when it is looked into
            if id(value) in self.containers or len(value) > 10_000:
                return
            self.containers[id(value)] = (value, value.copy())
            if depth:
                for item in value.values() if isinstance(value, dict) else value:
                    self._save(item, depth - 1)
        elif isinstance(value, types.FunctionType):
            for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self._save(default, 1)
            if depth and value.__closure__:
                for cell in value.__closure__:
                    with suppress(ValueError):  # an empty cell
                        self._save(cell.cell_contents, 0)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.caches.append((value, value.cache_info().currsize))
        elif isinstance(value, torch.Generator):
            self.generators[id(value)] = (value, value.get_state())
        elif isinstance(value, random.Random):
            self.generators[id(value)] = (value, value.getstate())
        elif isinstance(value, np.random.Generator):
            self.generators[id(value)] = (value, value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self.generators[id(value)] = (value, value.get_state())

    def restore(self) -> None:
        for scope, saved in self.namespaces:
            for name in [n for n in scope if n not in saved]:
                if not isinstance(scope[name], types.ModuleType):  # an import inside a function stays
                    del scope[name]
            for name, value in saved.items():
                if scope.get(name, scope) is not value:
                    scope[name] = value
        for cls, attributes in self.classes:
            now = dict(vars(cls))
            for name in now.keys() - attributes.keys():
                delattr(cls, name)
            for name, value in attributes.items():
                if now.get(name, now) is not value and name not in ("__dict__", "__weakref__"):
                    setattr(cls, name, value)
        for value, saved in self.containers.values():
            if not _same(value, saved):
                _refill(value, saved)
        for cached, size in self.caches:
            if cached.cache_info().currsize != size:
                cached.cache_clear()
        for generator, state in self.generators.values():
            _set_state(generator, state)


def _same(value: Any, saved: Any) -> bool:
    if len(value) != len(saved):
        return False
    if isinstance(value, dict):
        return all(a is b and value[a] is saved[b] for a, b in zip(value, saved, strict=True))
    if isinstance(value, set):
        return {id(v) for v in value} == {id(v) for v in saved}
    return all(a is b for a, b in zip(value, saved, strict=True))


def _refill(value: Any, saved: Any) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(saved)
    else:
        value.extend(saved)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif generator is not _NUMPY:
        generator.set_state(state)
