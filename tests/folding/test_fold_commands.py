"""``se-retrofit fold`` and ``se-retrofit export``."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import timm
import torch
from command_line import called as run
from networks import randomised

from se_retrofit import RetrofitError, add_se, has_se, load_retrofitted, save_retrofitted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = add_se(randomised(timm.create_model("test_resnet", num_classes=10)), bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("fc.2.bias"):
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    return save_retrofitted(model, tmp_path / "net")


def test_fold_saves_a_network_without_se_that_computes_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    report = tmp_path / "fold.json"
    arguments = ("--image-size", "32", "--batches", "2", "--json", str(report))
    result = run("fold", ".", "--data", "digits", *arguments)
    assert result.exit_code == 0, result.output
    assert "sites folded" in result.output
    assert "accuracy: " in result.output
    assert json.loads(report.read_text())["inputs"] == 64
    before, after = load_retrofitted(folder), load_retrofitted(tmp_path / "net-folded")
    assert has_se(before)
    assert not has_se(after)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(after(x), before(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_export_writes_what_is_asked_for(folder: Path, tmp_path: Path) -> None:
    result = run("export", str(folder), "--format", "source", "--native")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "net.py").exists()
    assert (tmp_path / "net.safetensors").exists()
    file = tmp_path / "other.py"
    result = run("export", str(folder), "--output", str(file), "--input-size", "3x32x32")
    assert result.exit_code == 0, result.output
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(runpy.run_path(str(file))["load"]()(x), load_retrofitted(folder)(x))


def test_mistakes_are_said(folder: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (("fold", str(tmp_path / "none"), "--data", "digits"), "no folder"),
        (("fold", str(folder), "--data", "digits", "--tolerance", "-1"), "tolerance"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert isinstance(result.exception, RetrofitError)
        assert says in str(result.exception)
    assert run("export", str(folder), "--format", "tf").exit_code == 2
    assert run("export", str(folder), "--format", "pt2", "--input-size", "3by3").exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"]
