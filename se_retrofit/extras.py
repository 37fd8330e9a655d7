"""Packages that only a part of this one needs: an installation may do without them, and is told what it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RetrofitError

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports inside it are of packages that an extra installs.

    Args:
        name: of the extra in ``pyproject.toml``: ``"finetune"``, ``"inspect"`` or ``"cli"``.

    Raises:
        RetrofitError: a package is missing; the message names it and the extra.

    Example:
        >>> from se_retrofit.extras import extra
        >>> with extra("inspect"):
        ...     import graphviz
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise  # a mistake of our own
        raise RetrofitError(
            f"the package {error.name.partition('.')[0]} is not installed; install what this needs with "
            f"pip install 'se-retrofit[{name}]'"
        ) from error
