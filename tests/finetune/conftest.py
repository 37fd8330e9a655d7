from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_data, tiny_network
from torch import nn

from se_retrofit.finetune import FinetuneConfig, NamedData


@pytest.fixture
def network() -> Callable[[], nn.Module]:
    return tiny_network


@pytest.fixture
def config() -> Callable[..., FinetuneConfig]:
    return tiny_config


@pytest.fixture(scope="session")
def digits() -> NamedData:
    return tiny_data()


@pytest.fixture
def same() -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """Whether two state dicts are equal bit for bit."""

    def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    return equal


@pytest.fixture
def drawn_pictures() -> None:
    """For tests that look at the pictures of a run."""


@pytest.fixture(autouse=True)
def empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its curves takes two fifths of a run as short as these: it is left to the sweeps, and to tests that ask for it."""
    if "drawn_pictures" not in request.fixturenames and request.node.get_closest_marker("sweep") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **options: Path(path).touch())
