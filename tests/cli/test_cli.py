"""The command line: right answers, exit codes that a script can rely on, no traceback for a user's mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from networks import se_modules
from torch import nn
from typer.testing import CliRunner, Result

import se_retrofit.cli.add as command
from se_retrofit import RetrofitError, SEAttention, add_se, load_retrofitted
from se_retrofit.cli import main
from se_retrofit.cli.commands import app
from se_retrofit.cli.options import RECIPE_FIELDS, recipe_fields
from se_retrofit.finetune import FinetuneConfig
from se_retrofit.models import Base

# the smallest residual network in timm, made for tests: 160x160 images
SMALL = "timm/test_resnet"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_add_prints_the_plan_and_checks_the_identity() -> None:
    result = run("add", SMALL)
    assert result.exit_code == 0, result.output
    assert "SE modules" in result.output
    assert "layer1.0" in result.output
    assert "norms' parameters and statistics drawn at random" in result.output
    assert "eval mode: equal bit for bit, all 2,000 values" in result.output
    assert "train mode: equal bit for bit, all 2,000 values" in result.output
    assert "counter-check: with random gates they differ" in result.output
    assert result.output.rstrip().endswith("verdict: the same function")


def test_convert_finds_out_that_a_network_is_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, **options: object) -> nn.Module:
        retrofitted = add_se(model, **options)  # type: ignore[arg-type]
        retrofitted.fc.register_forward_hook(lambda module, args, output: output + 1e-6)
        return retrofitted

    monkeypatch.setattr(command, "add_se", broken)
    result = run("add", SMALL)
    assert result.exit_code == 1
    assert "different, by" in result.output
    assert "NOT shown to be the same function" in result.output


def test_convert_finds_out_that_se_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(model: nn.Module, **options: object) -> nn.Module:
        retrofitted = add_se(model, **options)  # type: ignore[arg-type]
        for module in retrofitted.modules():
            if isinstance(module, SEAttention):
                module.forward = lambda x: x  # type: ignore[method-assign]
        return retrofitted

    monkeypatch.setattr(command, "add_se", idle)
    result = run("add", SMALL)
    assert result.exit_code == 1
    assert "SE takes no part" in result.output


def test_a_sigmoid_gate_is_said_to_be_no_identity() -> None:
    result = run("add", SMALL, "--gate", "sigmoid")
    assert result.exit_code == 0, result.output
    assert "eval mode: different" in result.output
    assert "not the same function, as expected" in result.output


def test_modules_that_a_user_names_get_se_alone_or_beside_the_blocks() -> None:
    alone = run("add", SMALL, "--at", "maxpool", "--at", "layer1.0.conv1").output
    assert "2 SE modules" in alone
    beside = run("add", SMALL, "--at", "maxpool", "--auto").output
    assert "5 SE modules" in beside
    assert "maxpool" in beside


def test_options_reach_the_retrofit() -> None:
    everything = run("add", SMALL, "--reduction", "2").output
    assert "layer4.0" in everything
    part = run("add", SMALL, "--reduction", "2", "--include", "layer1.*", "--include", "layer2.*").output
    assert "layer2.0" in part
    assert "layer4.0  residual" not in part
    rest = run("add", SMALL, "--exclude", "layer4.*").output
    assert "layer4.0  residual" not in rest
    assert "layer3.0  residual" in rest


def test_the_output_holds_the_checkpoint_that_it_started_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, folder = tmp_path / "weights.pth", tmp_path / "se"
    original = Base.of(SMALL, num_classes=5).build()
    torch.save(original.state_dict(), weights)
    result = run("add", SMALL, "--num-classes", "5", "--checkpoint", str(weights), "--output", str(folder))
    assert result.exit_code == 0, result.output
    assert "drawn at random" not in result.output  # the weights given are the ones that were checked
    assert f"saved {folder}" in result.output
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(original.eval()(x), load_retrofitted(folder)(x))


def test_the_output_folder_loads_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "se"
    result = run("add", SMALL, "--num-classes", "5", "--reduction", "4", "--output", str(folder))
    assert result.exit_code == 0, result.output
    loaded = load_retrofitted(folder)
    assert [se.hidden for se in se_modules(loaded).values()] == [8, 12, 48, 24]
    assert loaded(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet5"], "close names: resnet50"),
        (["keras/resnet50"], "no library 'keras'"),
        ([SMALL, "--checkpoint", "nowhere.pth"], "no checkpoint file nowhere.pth"),
        ([SMALL, "--output", "nowhere/se"], "no folder nowhere"),
        ([SMALL, "--include", "stage9.*"], "stage9"),
        (["timm/test_vit"], "VisionTransformer"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_the_reason(arguments: list[str], said: str) -> None:
    result = run("add", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, RetrofitError)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", SMALL, "--reduction", "0"],
        ["add", SMALL, "--reduction", "many"],
        ["add", SMALL, "--pretrained", "--checkpoint", "x.pth"],
        ["add", SMALL, "--placement", "middle"],
        ["add", SMALL, "--gate", "tanh"],
        ["finetune", SMALL, "--data", "digits", "--gate", "tanh"],
        ["add", SMALL, "--nonsense"],
        ["demo", "--epochs", "0"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_an_output_that_is_in_the_way_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("add", SMALL, "--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "exists and is a file" in str(result.exception)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command_name", ["demo", "add"])
def test_help_shows_examples(command_name: str) -> None:
    result = run(command_name, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"se-retrofit {command_name}" in result.output


def test_ctrl_c_while_it_starts_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    class Importing:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "se_retrofit.cli.commands", Importing())
    monkeypatch.setattr(sys, "argv", ["se-retrofit", "add", SMALL])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["se-retrofit", "add", "resnet[bold]50"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: no model 'resnet[bold]50' in timm or torchvision")
    assert said.err.count("\n") == 1


@pytest.mark.sweep
def test_the_module_runs_as_a_program_whose_piped_output_has_no_colours_and_unbroken_lines() -> None:
    command_line = [sys.executable, "-m", "se_retrofit", "add", SMALL]
    process = subprocess.run(command_line, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "\x1b" not in process.stdout
    assert (
        "check on two photographs (china.jpg, flower.jpg of scikit-learn), prepared as the model wants them:\n"
        in process.stdout
    )


def test_version_is_printed() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("se-retrofit ")


@pytest.mark.parametrize("name", ["finetune", "compare", "find-lr"])
def test_options_of_the_recipe_are_its_fields(name: str) -> None:
    group = typer.main.get_command(app)
    with group.make_context("se-retrofit", [name], resilient_parsing=True) as parent:
        command = group.get_command(parent, name)  # type: ignore[attr-defined]
        words = ["resnet18", "--data", "digits", "--batch-size", "8", "--seed", "3", "--compile", "--precision", "bf16"]
        with command.make_context(name, words, parent=parent) as context:
            assert recipe_fields(context) == {"batch_size": 8, "seed": 3, "compile": True, "precision": "bf16"}
            shared = set(FinetuneConfig.model_fields) & {p.name.rstrip("_") for p in command.params}
            assert {name.rstrip("_") for name in RECIPE_FIELDS if name in context.params} == shared
