from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import se_retrofit.cli.compare
import se_retrofit.cli.finetune
import se_retrofit.finetune
from se_retrofit import RetrofitError, has_se, load_retrofitted
from se_retrofit.cli.commands import app
from se_retrofit.finetune import FinetuneConfig, evaluate, load_data
from se_retrofit.models import Base

SMALL = ["--image-size", "16", "--batch-size", "128", "--lr", "1e-3", "--cpu"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.sweep
def test_digits_from_the_command_line_to_a_network_that_predicts(tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = run("finetune", "timm/test_resnet", "--data", "digits", "--epochs", "1", *SMALL, "--output", str(output))
    assert "SE modules" in said
    assert "best validation accuracy" in said
    model = load_retrofitted(output / "best")
    assert has_se(model)
    assert model.fc.out_features == 10
    accuracy = evaluate(model, load_data("digits", image_size=16).val).accuracy
    assert f"best validation accuracy {accuracy:.2%}" in said
    assert FinetuneConfig.from_yaml(output / "config.yaml").num_classes == 10
    assert "resumed" in run("finetune", "--resume", str(output))
    with pytest.raises(RetrofitError, match=r"--resume reads every option but --epochs from .*; remove lr, model"):
        run("finetune", "resnet18", "--lr", "3", "--resume", str(output))
    with pytest.raises(RetrofitError, match=r"holds no run to resume"):
        run("finetune", "--resume", str(tmp_path))


def test_torchvision_networks_and_the_recipe_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 7\nlabel_smoothing: 0.0\nclip_grad: null\n")
    output = tmp_path / "run"
    run(
        "finetune", "torchvision/squeezenet1_1", "--data", "digits", "--config", str(tmp_path / "recipe.yaml"),
        "--epochs", "1",
        "--set", "optimizer=sgd", "--set", "optimizer_options={nesterov: true}", "--trainable", "se+head", *SMALL,
        "--image-size", "32", "--output", str(output), "--reduction", "4",
    )  # fmt: skip
    recipe = FinetuneConfig.from_yaml(output / "config.yaml")
    assert (recipe.epochs, recipe.label_smoothing, recipe.clip_grad, recipe.optimizer) == (1, 0.0, None, "sgd")
    assert recipe.optimizer_options == {"nesterov": True}
    assert type(load_retrofitted(output / "best")).__name__ == "SqueezeNet"


def test_mistakes_are_one_clear_error(tmp_path: Path) -> None:
    for arguments, says in [
        (["nosuchnet", "--data", "digits"], "no model 'nosuchnet'"),
        (["resnet18", "--data", "digit"], "no data 'digit'"),
        (["resnet18"], "give a MODEL and --data, or --resume FOLDER"),
        (["resnet18", "--data", "digits", "--set", "epoch=3"], "did you mean epochs"),
        (["resnet18", "--data", "digits", "--set", "epochs=many"], "epochs: "),
        (["resnet18", "--data", "digits", "--set", "epochs"], "NAME=VALUE"),
        (["resnet18", "--data", "digits", "--arg", "wings=2"], "can't be built"),
        (["resnet18", "--data", "digits", "--config", "none.yaml"], "can't be read"),
        (["resnet18", "--data", "digits", "--pretrained", "--checkpoint", "x"], "or --checkpoint, not both"),
    ]:
        with pytest.raises(RetrofitError, match=says):
            run("finetune", *arguments, "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.sweep
def test_a_run_is_repeated_from_its_description_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(
        "finetune", "timm/test_resnet", "--data", "digits", "--epochs", "1", *SMALL, "--placement", "post", "--reduction", "4",
        "--arg", "act_layer=gelu", "--seed", "3", "--output", str(first),
    )  # fmt: skip
    second.mkdir()
    shutil.copy(first / "run.yaml", second)
    run("finetune", "--resume", str(second))
    a, b = (load_file(folder / "best" / "weights.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_another_experiment_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compare goes on with what its folder holds: with other weights, SE or recipe it must not find this one's."""
    monkeypatch.chdir(tmp_path)
    folders: list[Path] = []

    def noted(*_: object, output_dir: Path, **__: object) -> str:
        folders.append(output_dir)
        return "a comparison"

    monkeypatch.setattr(se_retrofit.finetune, "compare", noted)
    torch.save(Base.of("resnet10t", num_classes=10).build().state_dict(), "weights.pth")
    start = ["compare", "resnet10t", "--data", "digits", *SMALL]
    variants = [
        [], ["--checkpoint", "weights.pth"], ["--pretrained"], ["--placement", "identity"], ["--gate", "sigmoid"],
        ["--arg", "act_layer=gelu"], ["--epochs", "3"], ["--seed", "1"], ["--image-size", "24"],
    ]  # fmt: skip
    for variant in [*variants, []]:
        run(*start, *variant)
    assert folders[-1] == folders[0]
    assert len(set(folders)) == len(variants)


@pytest.mark.sweep
def test_compare_prints_and_writes(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--seeds", "2", *SMALL, "--output", str(tmp_path), "--arms", "plain,cbam"]
    said = run("compare", "timm/test_resnet", "--data", "digits", *options)
    for piece in (
        "without SE",
        "with CBAM",
        "seed 1, accuracy %",
        "ms per step",
        "parameters",
        "2 seeds, 360 images",
    ):
        assert piece in said
    assert (tmp_path / "comparison.json").exists()
