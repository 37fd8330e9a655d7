"""The error that the package raises on purpose, and helpers that raise it or check arguments."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class RetrofitError(ValueError):
    """Raised if something about the model or the options makes the requested operation impossible.

    The message says what was given, what was expected and what to do. The given model is then as it was before the
    call.
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a failing import in its body into an error that names the extra: "finetune", "inspect" or "cli"."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise  # a bug of our own
        raise RetrofitError(
            f"the package {error.name.partition('.')[0]} is not installed; install what this needs with "
            f"pip install 'se-retrofit[{name}]'"
        ) from error


@contextmanager
def told_as_fault() -> Iterator[None]:
    """Turn any other error raised in its body into a ``RetrofitError`` that asks to report it as a bug of this package.
    Arguments are checked before. Running out of memory is not a bug, nor is a warning that was turned into an error."""
    from torch import OutOfMemoryError

    try:
        yield
    except (RetrofitError, Warning, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # of the CPU, for which torch has no class of errors
            raise
        raise RetrofitError(
            f"a fault of se_retrofit, please report it with this traceback: {type(error).__name__}: {error}. The model is unchanged"
        ) from error


def brief(value: object) -> str:
    """Return the repr of a value for an error message, in one line and shortened if it is long."""
    shorten = reprlib.Repr()
    shorten.maxother = shorten.maxstring = 60
    return " ".join(shorten.repr(value).split())


def check_positive(name: str, value: int) -> None:
    """Raise an error unless ``value`` is an int of at least 1 (not a bool)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {brief(value)} of type {type(value).__name__}")
    if value < 1:
        raise RetrofitError(f"{name} must be at least 1, got {value}")


def check_module(value: object, name: str = "model") -> None:
    """Raise an error if an argument is not an nn.Module."""
    from torch import nn

    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an nn.Module, got the class {value.__name__}; make an instance of it: {value.__name__}(...)"
        )
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {brief(value)} of type {type(value).__name__}")


def check_unwrapped(model: nn.Module) -> None:
    """Raise an error if a model is the network in one of torch's wrappers, whose keys and paths differ from its own."""
    from torch import nn

    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    how, own = ("DistributedDataParallel or DataParallel", "module") if parallel else ("torch.compile", "_orig_mod")
    if own in model._modules:  # not hasattr: a __getattr__ may answer to every name
        raise RetrofitError(f"the model is wrapped by {how}: give what is in it, model.{own}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise an error unless ``value`` is one of some strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {brief(value)}")
    if value not in choices:
        raise RetrofitError(f"{name} must be one of {', '.join(map(repr, choices))}, got {brief(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise an error unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {brief(value)}")
