from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from pictures import make_folder
from tiny import RECIPE, Finished, config, trained

from se_retrofit import add_se
from se_retrofit.finetune import load_data
from se_retrofit.finetune.log import Log

PICTURES = Log.pictures


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run on the digits, by ``RECIPE``, for tests that leave its folder as it is."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = trained(recipe=RECIPE, output_dir=folder, quiet=False)
    return Finished(folder, config(**RECIPE), result, said.getvalue().splitlines())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/, of red and blue images, for tests that leave it as it is."""
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The folder of a run on ``pictures``, for tests that leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_se(timm.create_model("test_resnet", num_classes=2))
    recipe = {"epochs": 2, "batch_size": 8, "image_size": 64, "transform_options": {"scale": (0.8, 1.0)}}
    folder = tmp_path_factory.mktemp("run")
    trained(model, load_data(pictures), recipe=recipe, output_dir=folder)
    return folder


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
