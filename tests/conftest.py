"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

# One thread a process: the tests run on many small networks, and in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure() -> None:
    # in a job in the background it is ignored, and the programs that tests start and interrupt would inherit that
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    freeze_heap()


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    yield
    freeze_heap()


def freeze_heap() -> None:
    """What has been imported by now stays to the end: full garbage collections, of which Accelerate asks for two in each
    fine-tune, need not walk through it. They took half of the time of the fine-tuning tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts from the same random state and in the same modes, whatever ran before it."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def timm_registry_as_before() -> Iterator[None]:
    """timm's registry is global: what a test adds goes again."""
    from timm.models import _registry

    tables = [
        value for name, value in vars(_registry).items() if name.startswith("_m") and isinstance(value, (dict, set))
    ]
    before = [table.copy() for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
