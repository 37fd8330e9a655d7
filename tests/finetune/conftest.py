from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_data

from se_retrofit.finetune import NamedData


@pytest.fixture(scope="session")
def digits() -> NamedData:
    return tiny_data()


@pytest.fixture
def drawn_pictures() -> None:
    """For tests that look at the pictures of a run."""


@pytest.fixture(autouse=True)
def empty_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its curves takes two fifths of a run as short as these: it is left to the sweeps, and to tests that ask for it."""
    if "drawn_pictures" not in request.fixturenames and request.node.get_closest_marker("sweep") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **options: Path(path).touch())
