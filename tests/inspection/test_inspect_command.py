"""``se-retrofit inspect``: prints and writes what it is asked for, and says what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import called
from command_line import said as run
from PIL import Image

from se_retrofit import RetrofitError, add_se, inspect_se, load_retrofitted, save_retrofitted
from se_retrofit.finetune import FinetuneConfig, finetune
from se_retrofit.models import Base

BASE = Base.of("timm/test_resnet", num_classes=10)
SMALL = ["inspect", "timm/test_resnet", "--num-classes", "10", "--input-size", "3x64x64"]


def test_the_report_is_what_it_prints_by_default_and_options_reach_the_retrofit() -> None:
    output = run(*SMALL, "--include", "layer[12].*", "--gate", "sigmoid", "--reduction", "16")
    assert "ResNet with Squeeze-and-Excitation" in output
    assert "SE modules         2, reduction 16, gate sigmoid" in output
    assert "for one 3x64x64 input" in output
    assert "layer3.0, layer4.0: not included" in output
    assert "\x1b" not in output


def test_graph_block_and_diff() -> None:
    assert "> layer2.0" in run(*SMALL, "--graph")
    block = run(*SMALL, "--graph", "--block", "layer2.0")
    assert block == run(*SMALL, "--block", "layer2.0")
    assert "call_module" in block
    assert "layer1.0" not in block
    assert run(*SMALL, "--diff", "--block", "layer2.0").count("+++ layer2.0, ") == 1


def test_files_and_json_alone_on_standard_output(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "a.html", "a.json")]
    output = run(*SMALL, "--draw", str(paths[0]), "--html", str(paths[1]), "--json", str(paths[2]))
    assert all(str(path) in output for path in paths)
    assert paths[0].read_text().startswith("<svg")
    assert paths[1].read_text().startswith("<!doctype html>")
    assert json.loads(paths[2].read_text())["network"] == "timm/test_resnet"
    result = called(*SMALL, "--json", "-", "--diff")
    assert json.loads(result.stdout) == json.loads(paths[2].read_text())
    assert "+++" in result.stderr


def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    save_retrofitted(add_se(BASE.build(), 4), tmp_path / "net", base=BASE)
    assert "reduction 4" in run("inspect", str(tmp_path / "net"))
    result = called("inspect", tmp_path / "net", "--reduction", "8")
    assert result.exit_code == 2
    assert "--reduction" in result.output


@pytest.mark.parametrize("pictures", [True, False])
def test_the_network_of_a_run_is_counted_at_the_size_of_the_run(pictures: bool, tmp_path: Path) -> None:
    image: Any = Image.new("RGB", (40, 40)) if pictures else torch.zeros(3, 64, 64)
    recipe = FinetuneConfig(epochs=1, batch_size=4, image_size=64, workers=0, cpu=True)
    finetune(add_se(BASE.build()), [(image, n % 2) for n in range(4)], config=recipe, output_dir=tmp_path, quiet=True)
    assert "for one 3x64x64 input" in run("inspect", str(tmp_path))
    assert "for one 3x96x96 input" in run("inspect", str(tmp_path), "--input-size", "3x96x96")
    assert ("3x64x64" in str(inspect_se(load_retrofitted(tmp_path)))) == pictures


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["inspect", "resnet1888"], "resnet1888"),
        (["inspect", "./nowhere"], "nowhere"),
        ([*SMALL, "--block", "layer9"], "layer9"),
        ([*SMALL, "--draw", "a.jpg"], "a.jpg"),
        ([*SMALL, "--html", "a.pdf"], "a.pdf"),
        ([*SMALL, "--html", "nowhere/a.html"], "nowhere"),
        ([*SMALL, "--json", "nowhere/a.json"], "nowhere"),
        (["inspect", "timm/seresnet18"], "channel attention"),
    ],
)
def test_mistakes_are_one_error_and_write_nothing(
    arguments: list[str], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RetrofitError, match=wrong):
        run(*arguments, "--diff")
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_2_and_help_shows_examples() -> None:
    result = called("inspect", "resnet18", "--input-size", "3by4")
    assert result.exit_code == 2
    assert "3x224x224" in result.output
    assert "se-retrofit inspect resnet50 --reduction 16 --graph --block layer1.0" in run("inspect", "--help")
