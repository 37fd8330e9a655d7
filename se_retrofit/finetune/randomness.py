"""Everything random is seeded from its position in the run: (seed, what, epoch, index).

A checkpoint therefore needs no generator state: a run that is resumed at update 1234 draws the same numbers as an
uninterrupted run at update 1234, with any number of data-loading processes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

ORDER, SAMPLE, UPDATE, EPOCH = range(4)  # the kinds of random draws, each with seeds of its own


def derive(*parts: int) -> int:
    """Return a 32-bit seed derived from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_all(*parts: int) -> None:
    """Seed Python, NumPy and torch (the CPU and the accelerators in use) from several numbers.

    ``torch.manual_seed`` also notes the seed, with a formatted stack, for each kind of device that is not in use. This
    takes a millisecond, for each update and each image.
    """
    value = derive(*parts)
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():  # it isn't in a forked loading process
            device.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Restore the states of the caller's random generators on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    if torch.cuda.is_available():
        torch.cuda.init()  # a seed set before CUDA is initialised would take effect after the body
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
