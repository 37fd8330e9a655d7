"""The command line: right answers, exit codes that a script can rely on, no traceback for a user's mistake."""

from __future__ import annotations

import functools
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from command_line import called as run
from command_line import said
from networks import se_modules
from torch import nn

from se_retrofit import SEAttention, add_se, load_retrofitted
from se_retrofit.cli import main
from se_retrofit.cli.app import run as run_application
from se_retrofit.cli.commands import app
from se_retrofit.cli.demo import verdict
from se_retrofit.cli.demo_network import SmallResNet
from se_retrofit.cli.options import recipe_of
from se_retrofit.finetune import FinetuneConfig
from se_retrofit.models import Base

# the smallest residual network in timm, made for tests: 160x160 images
SMALL = "timm/test_resnet"


def test_add_prints_the_plan_and_checks_the_identity() -> None:
    output = said("add", SMALL)
    for piece in (
        "SE modules",
        "layer1.0",
        "norms' parameters and statistics drawn at random",
        "eval mode: equal bit for bit, all 2,000 values",
        "train mode: equal bit for bit, all 2,000 values",
        "counter-check: with random gates they differ",
    ):
        assert piece in output
    assert output.rstrip().endswith("verdict: the same function")


def shifted(model: nn.Module) -> None:
    model.fc.register_forward_hook(lambda module, args, output: output + 1e-6)


def idle(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, SEAttention):
            module.forward = lambda x: x  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(shifted, ["different, by", "NOT shown to be the same function"]), (idle, ["SE takes no part"])],
)
def test_add_finds_out_that_a_network_is_not_the_same_or_se_takes_no_part(
    spoil: Callable[[nn.Module], None], says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Module, **options: object) -> nn.Module:
        retrofitted = add_se(model, **options)  # type: ignore[arg-type]
        spoil(retrofitted)
        return retrofitted

    monkeypatch.setattr("se_retrofit.retrofit.add_se", broken)
    result = run("add", SMALL)
    assert result.exit_code == 1
    for piece in says:
        assert piece in result.output


def test_a_sigmoid_gate_is_said_to_be_no_identity() -> None:
    output = said("add", SMALL, "--gate", "sigmoid")
    assert "eval mode: different" in output
    assert "not the same function, as expected" in output


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
    output = said("add", SMALL, *options)
    assert f"{sites} SE modules" in output
    assert there in output
    assert not_there not in output


def test_the_output_folder_loads_as_it_is_with_the_checkpoint_that_it_started_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, folder = tmp_path / "weights.pth", tmp_path / "se"
    original = Base.of(SMALL, num_classes=5).build()
    torch.save({f"net.{key}": value for key, value in original.state_dict().items()}, weights)
    options = ["--num-classes", "5", "--reduction", "4", "--checkpoint", str(weights), "--output", str(folder)]
    assert "remap" in str(run("add", SMALL, *options).exception)
    output = said("add", SMALL, *options, "--remap", "order")
    assert "drawn at random" not in output  # the weights given are the ones that were checked
    assert f"saved {folder}" in output
    loaded, x = load_retrofitted(folder), torch.randn(2, 3, 64, 64)
    assert [se.hidden for se in se_modules(loaded).values()] == [8, 12, 48, 24]
    assert torch.equal(original.eval()(x), loaded(x))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("add resnet5", 1, "close names: resnet50"),
        ("add resnet[bold]50", 1, "no model 'resnet[bold]50' in timm or torchvision"),
        ("add keras/resnet50", 1, "no library 'keras'"),
        (f"add {SMALL} --checkpoint nowhere.pth", 1, "no checkpoint file nowhere.pth"),
        (f"add {SMALL} --output nowhere/se", 1, "no folder nowhere"),
        (f"add {SMALL} --include stage9.*", 1, "stage9"),
        ("add timm/test_vit", 1, "VisionTransformer"),
        ("finetune", 2, "error: give a MODEL and --data"),
        (f"finetune {SMALL} --data digits --epochs 0", 2, "error: --epochs: "),
        ("finetune --resume run --lr 1", 2, "error: --resume reads"),
        (f"find-lr {SMALL} --data digits --arg x", 2, "error: --arg takes NAME=VALUE"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["se-retrofit", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert says in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        f"add {SMALL} --reduction 0",
        f"add {SMALL} --reduction many",
        f"add {SMALL} --pretrained --checkpoint x.pth",
        f"add {SMALL} --remap order",
        f"add {SMALL} --placement middle",
        f"add {SMALL} --gate tanh",
        f"add {SMALL} --nonsense",
        f"finetune {SMALL} --data digits --pretrained --checkpoint x.pth",
        f"finetune {SMALL} --data digits --epochs many",
        f"finetune {SMALL} --data digits --precision fp8",
        "evaluate . --data digits --split tests",
        "predict . picture.png --top 0",
        "demo --epochs 0",
        "nonsense",
    ],
)
def test_wrong_usage_exits_with_2(arguments: str) -> None:
    assert run(*arguments.split()).exit_code == 2


@pytest.mark.parametrize(
    ("output", "says"), [("file", "is a file"), ("folder", "mine"), (".", "as a whole"), ("..", "as a whole")]
)
def test_an_output_that_is_in_the_way_is_refused_before_the_work(
    output: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "file", tmp_path / "folder" / "mine"):
        file.write_text("mine")
    monkeypatch.chdir(tmp_path / "folder" if output == ".." else tmp_path)
    result = run("add", SMALL, "--output", output)
    assert (result.exit_code, result.output) == (1, "")
    assert says in str(result.exception)
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine", "mine"]


def test_help_is_quick_and_shows_examples_and_the_recipes_fields() -> None:
    """Without torch, whose import takes seconds."""
    program = "import sys; from se_retrofit.cli import main; sys.argv[1:] = ['finetune', '--help']\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert all(f"--{name.replace('_', '-')}" in told for name in FinetuneConfig.model_fields)
    for name in ("demo", "add"):
        assert f"se-retrofit {name}" in said(name, "--help").partition("Examples")[2]
    assert said("--version").startswith("se-retrofit ")


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


@pytest.mark.sweep
def test_the_module_runs_as_a_program_whose_piped_output_has_no_colours_and_unbroken_lines() -> None:
    command_line = [sys.executable, "-m", "se_retrofit", "add", SMALL]
    process = subprocess.run(command_line, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "\x1b" not in process.stdout
    assert "check on random inputs of the shape (2, 3, 160, 160):\n" in process.stdout


@pytest.mark.parametrize("name", ["finetune", "compare", "find-lr"])
def test_options_of_the_recipe_are_its_fields(name: str) -> None:
    group = typer.main.get_command(app)
    with group.make_context("se-retrofit", [name], resilient_parsing=True) as parent:
        command = group.get_command(parent, name)  # type: ignore[attr-defined]
        words = ["resnet18", "--data", "digits", "--batch-size", "8", "--seed", "3", "--compile", "--precision", "bf16"]
        with command.make_context(name, words, parent=parent) as context:
            recipe = recipe_of(context, {})
            assert recipe == FinetuneConfig(batch_size=8, seed=3, compile=True, precision="bf16")
    without = {"compare": {"patience"}, "find-lr": {"epochs", "max_updates", "lr", "patience"}, "finetune": set()}[name]
    assert set(FinetuneConfig.model_fields) - {p.name for p in command.params} == without


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_letters_that_the_output_lacks_are_escaped_and_a_full_disk_or_gpu_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, written = typer.Typer(), io.BytesIO()

    @own.command()
    def command() -> None:
        print("gr\u00fcn", flush=True)
        raise error

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["se-retrofit"])
    with pytest.raises(SystemExit) as ended:
        run_application(own)
    assert (ended.value.code, written.getvalue()) == (1, b"gr\\xfcn\n")
    assert capsys.readouterr().err == f"error: {error}\n"


# The demo: the same function after the surgery, honest numbers, the same run for the same seed


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """The demo's network with fewer channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("se_retrofit.cli.demo_network.SmallResNet", functools.partial(SmallResNet, widths=(8, 12, 32)))
        yield


@pytest.fixture(scope="module")
def output(narrow: None) -> str:
    return said("demo", "--epochs", 1)


def test_it_says_what_was_inserted_and_that_nothing_else_changed(output: str) -> None:
    for stage in range(3):
        for block in range(2):
            assert re.search(rf"stages\.{stage}\.{block} +residual +norm2", output)
    assert "6 SE modules" in output
    assert "Yes, in eval mode: torch.equal on all 3,600 outputs for the 360 validation images." in output
    assert "Yes, in train mode" in output
    assert "Gates: from 1.0 to 1.0." in output


def test_it_prints_accuracies_before_and_after(output: str) -> None:
    row = r"^(trained network|retrofitted, not yet fine-tuned|fine-tuned \w+ SE) .* (\S+)%$"
    rows = dict(re.findall(row, output, re.MULTILINE))
    assert len(rows) == 4
    assert rows["trained network"] == rows["retrofitted, not yet fine-tuned"]
    # one epoch is enough for digits to be far better than chance
    assert all(float(accuracy) > 50 for accuracy in rows.values())


@pytest.mark.sweep
def test_the_same_seed_gives_the_same_run_and_another_seed_another(output: str) -> None:
    runs = [output, *(said("demo", "--epochs", 1, "--seed", seed) for seed in (0, 1))]
    first, again, other = (re.sub(r"\d+ seconds", "", run) for run in runs)
    assert first == again != other


def test_a_retrofit_that_changes_the_outputs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_retrofit.retrofit.add_se", functools.partial(add_se, gate="sigmoid"))
    result = run("demo", "--epochs", 1)
    assert result.exit_code == 1
    assert "outputs differ" in str(result.exception)


@pytest.mark.parametrize(
    ("won", "lost", "says"),
    [
        (0, 0, "the same images are right"),
        (3, 0, "within the noise"),
        (20, 14, "within the noise"),
        (30, 5, "in favour of SE"),
        (5, 30, "in favour of the plain network"),
    ],
)
def test_the_verdict_claims_no_more_than_one_run_shows(won: int, lost: int, says: str) -> None:
    with_se = torch.tensor([True] * won + [False] * lost + [True] * 50 + [False] * 4)
    without = torch.tensor([False] * won + [True] * lost + [True] * 50 + [False] * 4)
    assert says in verdict(with_se, without)
