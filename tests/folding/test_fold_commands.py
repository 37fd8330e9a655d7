"""``se-retrofit fold`` and ``se-retrofit export``."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import timm
import torch
from command_line import called, said
from networks import assert_same_function, randomised
from own_networks import with_constant_gates

from se_retrofit import RetrofitError, add_se, has_se, load_retrofitted, save_retrofitted

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = add_se(randomised(timm.create_model("test_resnet", num_classes=10)), bias=True)
    return save_retrofitted(with_constant_gates(model), tmp_path / "net")


def test_fold_saves_a_network_without_se_that_computes_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    report = tmp_path / "fold.json"
    output = said("fold", ".", "--data", "digits", "--image-size", "32", "--batches", "2", "--json", report)
    assert "sites folded" in output
    assert "accuracy: " in output
    assert json.loads(report.read_text())["inputs"] == 64
    before, after = load_retrofitted(folder), load_retrofitted(tmp_path / "net-folded")
    assert has_se(before)
    assert not has_se(after)
    torch.testing.assert_close(after(X), before(X), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_export_writes_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    said("export", folder, "--format", "source", "--native")
    assert (tmp_path / "net.safetensors").exists()
    source = runpy.run_path(str(tmp_path / "net.py"))
    torch.testing.assert_close(source["load"]()(X), load_retrofitted(folder)(X), rtol=1e-3, atol=1e-4)
    file = tmp_path / "other.py"
    said("export", folder, "--output", file, "--input-size", "3x32x32")
    assert_same_function(runpy.run_path(str(file))["load"](), load_retrofitted(folder), X)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("fold", "none", "--data", "digits"), 1, "no folder"),
        (("fold", "net", "--data", "digits", "--tolerance", "-1"), 1, "tolerance"),
        (("export", "net", "--format", "tf"), 2, ""),
        (("export", "net", "--format", "pt2", "--input-size", "3by3"), 2, ""),
    ],
)
def test_mistakes_are_said(
    arguments: tuple[str, ...], code: int, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    result = called(*arguments)
    assert result.exit_code == code
    if code == 1:
        assert isinstance(result.exception, RetrofitError)
        assert says in str(result.exception)
    assert [path.name for path in folder.parent.iterdir()] == ["net"]
