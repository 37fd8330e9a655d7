"""What of a test's parameters the default run takes, and what the sweeps take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["swept"]


def swept(every_time: Iterable[Any], in_sweeps: Iterable[Any]) -> list[Any]:
    """Parameters of a test: some every time, the others in the sweeps alone."""
    return [*every_time, *(pytest.param(parameter, marks=pytest.mark.sweep) for parameter in in_sweeps)]
