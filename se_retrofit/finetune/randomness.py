"""Everything random is seeded from where it happens: (seed, what, epoch, index).

So there is no generator state that a checkpoint would have to carry: a run that is resumed at update 1234 draws what
the uninterrupted run drew at update 1234, with any number of loading processes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["EPOCH", "ORDER", "SAMPLE", "UPDATE", "derive", "kept_randomness", "seed_all"]

ORDER, SAMPLE, UPDATE, EPOCH = range(4)  # what is random; each kind gets draws of its own


def derive(*parts: int) -> int:
    """A 32-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_all(*parts: int) -> None:
    """Seed Python, NumPy and torch (on all devices)."""
    value = derive(*parts)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """The caller's generators are, after the body, where they were before it."""
    python, numpy = random.getstate(), np.random.get_state()
    if torch.cuda.is_available():
        torch.cuda.init()  # a seed that is set before CUDA starts would take effect after the body
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
