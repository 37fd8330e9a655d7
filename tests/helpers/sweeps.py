"""Parameters of a test of which the default run takes a few, and the sweeps the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["swept"]


def swept(parameters: Iterable[Any], long: Callable[[Any], object]) -> list[Any]:
    """The parameters, with those that ``long`` holds for left to the sweeps."""
    return [pytest.param(p, marks=[pytest.mark.sweep] * bool(long(p))) for p in parameters]
