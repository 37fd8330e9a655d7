"""What of a test's parameters the default run takes, and what the sweeps take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

NEEDS_CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # libraries warn of much that is of no concern here, such as of a thread that had no CUDA context before
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# the device, as a parameter of a test that is run where there is one
ON_CUDA = pytest.param("cuda", marks=NEEDS_CUDA)


def swept(every_time: Iterable[Any], in_sweeps: Iterable[Any]) -> list[Any]:
    """Parameters of a test: some every time, the others in the sweeps alone."""
    return [*every_time, *(pytest.param(parameter, marks=pytest.mark.sweep) for parameter in in_sweeps)]
