"""The one error that the package raises on purpose, and its case of a package that is not installed."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["RetrofitError", "brief", "check_flag", "check_module", "extra", "told_as_fault"]


class RetrofitError(ValueError):
    """Something about the model or the options makes the requested retrofit impossible.

    The message says what was given, what was expected and what to do. Whenever it is raised, the model that was
    given is as it was before the call.
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside it are of packages that an extra installs: ``"finetune"``, ``"inspect"`` or ``"cli"``."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise  # a mistake of our own
        raise RetrofitError(
            f"the package {error.name.partition('.')[0]} is not installed; install what this needs with "
            f"pip install 'se-retrofit[{name}]'"
        ) from error


@contextmanager
def told_as_fault() -> Iterator[None]:
    """What is raised inside it and is no ``RetrofitError`` becomes one that asks to report it: it is a fault of this package.
    Arguments are checked before. That memory ran out is no fault, nor is a warning that the caller has made an error."""
    from torch import OutOfMemoryError

    try:
        yield
    except (RetrofitError, Warning, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        raise RetrofitError(
            f"a fault of se_retrofit, please report it with this traceback: {type(error).__name__}: {error}. The model is unchanged"
        ) from error


def brief(value: object) -> str:
    """A value for an error message: its repr in one line, cut short where it is long, as those of networks and tensors are."""
    shorten = reprlib.Repr()
    shorten.maxother = shorten.maxstring = 60
    return " ".join(shorten.repr(value).split())


def check_module(value: object, name: str = "model") -> None:
    """Refuse an argument that is not an nn.Module."""
    from torch import nn

    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an nn.Module, got the class {value.__name__}; make an instance of it: {value.__name__}(...)"
        )
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {brief(value)} of type {type(value).__name__}")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {brief(value)}")
