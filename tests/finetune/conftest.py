from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import make_folder
from tiny import tiny_data

from se_retrofit.finetune import NamedData
from se_retrofit.finetune.log import Log


@pytest.fixture(scope="session")
def digits() -> NamedData:
    return tiny_data()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/, of red and blue images, for tests that leave it as it is."""
    return make_folder(tmp_path_factory.mktemp("pictures"))


PICTURES = Log.pictures


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing its curves takes most of a run as short as these: it is left to tests that ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "pictures", lambda *_: None)
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the pictures of a run."""
    monkeypatch.setattr(Log, "pictures", PICTURES)
