"""``se-retrofit inspect``: prints and writes what it is asked for, and says what is wrong in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import se_retrofit.cli.inspect  # noqa: F401  (registers the command)
from se_retrofit import RetrofitError, add_se
from se_retrofit.cli.commands import app
from se_retrofit.models import Base

SMALL = ["inspect", "timm/resnet10t", "--num-classes", "10", "--input-size", "3x64x64"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_report_is_what_it_prints_by_default() -> None:
    output = run(*SMALL, "--reduction", "16")
    assert "ResNet with Squeeze-and-Excitation" in output
    assert "SE modules         4, reduction 16, gate identity" in output
    assert "for one 3x64x64 input" in output
    assert "\x1b" not in output


def test_graph_block_and_diff() -> None:
    assert "> " in run(*SMALL, "--graph")
    block = run(*SMALL, "--graph", "--block", "layer2.0")
    assert block == run(*SMALL, "--block", "layer2.0")
    assert "call_module" in block
    assert "layer1.0" not in block
    difference = run(*SMALL, "--diff")
    assert "+++ layer1.0, BasicBlock.forward with SE" in difference
    assert run(*SMALL, "--diff", "--block", "layer2.0").count("+++") == 1


def test_files(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "a.html", "a.json")]
    output = run(*SMALL, "--draw", str(paths[0]), "--html", str(paths[1]), "--json", str(paths[2]))
    assert all(str(path) in output for path in paths)
    assert paths[0].read_text().startswith("<svg")
    assert paths[1].read_text().startswith("<!doctype html>")
    assert json.loads(paths[2].read_text())["network"] == "timm/resnet10t"


@pytest.mark.sweep
def test_json_to_standard_output_is_json_alone() -> None:
    call = [sys.executable, "-m", "se_retrofit", *SMALL, "--json", "-", "--diff"]
    result = subprocess.run(call, capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["rows"]) == 4
    assert "+++" in result.stderr


def test_options_reach_the_retrofit() -> None:
    output = run(*SMALL, "--include", "layer[12].*", "--gate", "sigmoid", "--placement", "pre")
    assert "SE modules         2, reduction 8, gate sigmoid" in output
    assert "layer3.0, layer4.0: not included" in output


def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    from se_retrofit import save_retrofitted

    base = Base.of("timm/resnet10t", num_classes=10)
    save_retrofitted(add_se(base.build(), 4), tmp_path / "net", base=base)
    assert "reduction 4" in run("inspect", str(tmp_path / "net"))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "net"), "--reduction", "8"])
    assert result.exit_code == 2
    assert "--reduction: the network in the folder is built and retrofitted already" in " ".join(
        result.output.replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "resnet1888"], "no model 'resnet1888' in timm or torchvision; close names"),
        (["inspect", "./nowhere"], "no folder ./nowhere"),
        ([*SMALL, "--block", "layer9"], "no retrofitted block 'layer9'"),
        ([*SMALL, "--draw", "a.jpg"], "does not end in .svg"),
        ([*SMALL, "--html", "a.pdf"], r"does not end in \.html"),
        ([*SMALL, "--json", "nowhere/a.json"], "no folder nowhere"),
        (["inspect", "timm/seresnet18"], "has channel attention already"),
    ],
)
def test_mistakes_are_one_error_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RetrofitError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sweep
def test_a_mistake_is_a_line_not_a_traceback() -> None:
    call = [sys.executable, "-m", "se_retrofit", *SMALL, "--block", "layer9"]
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no retrofitted block 'layer9'")
    assert len(result.stderr.splitlines()) == 1


def test_wrong_usage_is_2() -> None:
    result = CliRunner().invoke(app, ["inspect", "resnet18", "--input-size", "3by4"])
    assert result.exit_code == 2
    assert "is not a size such as 3x224x224" in result.output


def test_help_shows_examples() -> None:
    assert "se-retrofit inspect resnet50 --reduction 16 --graph --block layer1.0" in run("inspect", "--help")
