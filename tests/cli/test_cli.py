"""The command line: right answers, exit codes that a script can rely on, no traceback for a user's mistake."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from command_line import called as run
from networks import se_modules
from torch import nn

from se_retrofit import RetrofitError, SEAttention, add_se, load_retrofitted
from se_retrofit.cli import main
from se_retrofit.cli.app import run as run_application
from se_retrofit.cli.commands import app
from se_retrofit.cli.options import recipe_fields
from se_retrofit.finetune import FinetuneConfig
from se_retrofit.models import Base

# the smallest residual network in timm, made for tests: 160x160 images
SMALL = "timm/test_resnet"


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

    monkeypatch.setattr("se_retrofit.retrofit.add_se", broken)
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

    monkeypatch.setattr("se_retrofit.retrofit.add_se", idle)
    result = run("add", SMALL)
    assert result.exit_code == 1
    assert "SE takes no part" in result.output


def test_a_sigmoid_gate_is_said_to_be_no_identity() -> None:
    result = run("add", SMALL, "--gate", "sigmoid")
    assert result.exit_code == 0, result.output
    assert "eval mode: different" in result.output
    assert "not the same function, as expected" in result.output


@pytest.mark.parametrize(
    ("options", "sites", "there", "not_there"),
    [
        (["--at", "maxpool", "--at", "layer1.0.conv1"], 2, "maxpool", "layer2.0  residual"),
        (["--at", "maxpool", "--auto"], 5, "layer2.0", "nothing"),
        (["--reduction", "2", "--include", "layer1.*", "--include", "layer2.*"], 2, "layer2.0", "layer4.0  residual"),
        (["--exclude", "layer4.*"], 3, "layer3.0  residual", "layer4.0  residual"),
    ],
)
def test_options_reach_the_retrofit(options: list[str], sites: int, there: str, not_there: str) -> None:
    said = run("add", SMALL, *options).output
    assert f"{sites} SE modules" in said
    assert there in said
    assert not_there not in said


def test_the_output_folder_loads_as_it_is_with_the_checkpoint_that_it_started_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, folder = tmp_path / "weights.pth", tmp_path / "se"
    original = Base.of(SMALL, num_classes=5).build()
    torch.save({f"net.{key}": value for key, value in original.state_dict().items()}, weights)
    options = ["--num-classes", "5", "--reduction", "4", "--checkpoint", str(weights), "--output", str(folder)]
    assert "remap" in str(run("add", SMALL, *options).exception)
    options += ["--remap", "order"]
    result = run("add", SMALL, *options)
    assert result.exit_code == 0, result.output
    assert "drawn at random" not in result.output  # the weights given are the ones that were checked
    assert f"saved {folder}" in result.output
    loaded, x = load_retrofitted(folder), torch.randn(2, 3, 64, 64)
    assert [se.hidden for se in se_modules(loaded).values()] == [8, 12, 48, 24]
    assert torch.equal(original.eval()(x), loaded(x))


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
        ["add", SMALL, "--remap", "order"],
        ["finetune", SMALL, "--data", "digits", "--pretrained", "--checkpoint", "x.pth"],
        ["add", SMALL, "--placement", "middle"],
        ["add", SMALL, "--gate", "tanh"],
        ["finetune", SMALL, "--data", "digits", "--gate", "tanh"],
        ["finetune", SMALL, "--data", "digits", "--epochs", "many"],
        ["finetune", SMALL, "--data", "digits", "--precision", "fp8"],
        ["add", SMALL, "--nonsense"],
        ["demo", "--epochs", "0"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("output", "said"), [("file", "is a file"), ("folder", "mine"), (".", "as a whole"), ("..", "as a whole")]
)
def test_an_output_that_is_in_the_way_is_refused_before_the_work(
    output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "file", tmp_path / "folder" / "mine"):
        file.write_text("mine")
    monkeypatch.chdir(tmp_path / "folder" if output == ".." else tmp_path)
    result = run("add", SMALL, "--output", output)
    assert (result.exit_code, result.output) == (1, "")
    assert said in str(result.exception)
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine", "mine"]


def test_help_is_quick_and_shows_examples_and_the_recipes_fields() -> None:
    """Without torch, whose import takes seconds."""
    program = "import sys; from se_retrofit.cli import main; sys.argv[1:] = ['finetune', '--help']\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "COLUMNS": "200"}
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert all(f"--{name.replace('_', '-')}" in told for name in FinetuneConfig.model_fields)
    for name in ("demo", "add"):
        assert f"se-retrofit {name}" in run(name, "--help").output.partition("Examples")[2]


@pytest.mark.parametrize("module", ["se_retrofit.cli.commands", "se_retrofit.models"])
def test_ctrl_c_while_it_starts_exits_with_130(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    class Importing:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, module, Importing())
    monkeypatch.setattr(sys, "argv", ["se-retrofit", "add", SMALL])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["add", "resnet[bold]50"], "no model 'resnet[bold]50' in timm or torchvision", 1),
        (["finetune"], "give a MODEL and --data", 2),
        (["finetune", SMALL, "--data", "digits", "--epochs", "0"], "--epochs: ", 2),
        (["finetune", "--resume", "run", "--lr", "1"], "--resume reads", 2),
        (["find-lr", SMALL, "--data", "digits", "--arg", "x"], "--arg takes NAME=VALUE", 2),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["se-retrofit", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {says}")
    assert said.err.count("\n") == 1


@pytest.mark.sweep
def test_the_module_runs_as_a_program_whose_piped_output_has_no_colours_and_unbroken_lines() -> None:
    command_line = [sys.executable, "-m", "se_retrofit", "add", SMALL]
    process = subprocess.run(command_line, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "\x1b" not in process.stdout
    assert "(china.jpg, flower.jpg of scikit-learn), prepared as the model wants them:\n" in process.stdout


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
    without = {"compare": {"patience"}, "find-lr": {"epochs", "max_updates", "lr", "patience"}, "finetune": set()}[name]
    assert set(FinetuneConfig.model_fields) - {p.name for p in command.params} == without


def test_letters_that_the_output_lacks_are_escaped_and_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, written = typer.Typer(), io.BytesIO()

    @own.command()
    def command() -> None:
        print("gr\u00fcn", flush=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["se-retrofit"])
    with pytest.raises(SystemExit) as ended:
        run_application(own)
    assert (ended.value.code, written.getvalue()) == (1, b"gr\\xfcn\n")
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
