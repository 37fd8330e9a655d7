from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import said as run
from pictures import make_folder
from safetensors.torch import load_file

import se_retrofit.finetune
from se_retrofit import RetrofitError, has_se, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, evaluate, load_data
from se_retrofit.models import Base

SMALL = ["--image-size", "16", "--batch-size", "256", "--lr", "1e-3", "--cpu"]
DIGITS = ["--data", "digits", "--epochs", "1", *SMALL]


@pytest.mark.sweep
def test_digits_from_the_command_line_to_a_network_that_predicts_and_again_from_its_description(tmp_path: Path) -> None:
    output, again = tmp_path / "run", tmp_path / "again"
    se = ["--placement", "post", "--reduction", "4", "--arg", "act_layer=gelu", "--seed", "3"]
    said = run("finetune", "timm/test_resnet", *DIGITS, *se, "--output", output)
    assert "SE modules" in said
    model = load_retrofitted(output / "best")
    assert has_se(model)
    assert model.fc.out_features == 10
    accuracy = evaluate(model, load_data("digits", image_size=16).val).accuracy
    assert f"best validation accuracy {accuracy:.2%}" in said
    assert FinetuneConfig.from_yaml(output / "config.yaml").num_classes == 10
    assert "resumed" in run("finetune", "--resume", output)
    again.mkdir()
    shutil.copy(output / "run.yaml", again)
    run("finetune", "--resume", again)
    a, b = (load_file(folder / "best" / "weights.safetensors") for folder in (output, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_torchvision_networks_and_the_recipe_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 7\nlabel_smoothing: 0.0\nclip_grad: 0.5\n")
    output, pictures = tmp_path / "run", make_folder(tmp_path / "pictures")
    run(
        "finetune", "torchvision/squeezenet1_1", "--data", pictures, "--config", tmp_path / "recipe.yaml", *SMALL,
        "--epochs", "1", "--optimizer", "sgd", "--optimizer-options", "{nesterov: true}", "--clip-grad", "none",
        "--trainable", "se+head", "--image-size", "32", "--workers", "0", "--output", output, "--reduction", "4",
    )  # fmt: skip
    recipe = FinetuneConfig.from_yaml(output / "config.yaml")
    assert (recipe.epochs, recipe.label_smoothing, recipe.clip_grad, recipe.optimizer) == (1, 0.0, None, "sgd")
    assert recipe.optimizer_options == {"nesterov": True}
    assert type(load_retrofitted(output / "best")).__name__ == "SqueezeNet"


def test_mistakes_are_one_clear_error_that_names_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("batch_size: 0\nlr: 0.0\n")
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "run.yaml").write_text("command: null\n")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "run.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.yaml").write_text("command: {data: 3}\nconfig: {}\n")
    for arguments, says in [
        (["nosuchnet", "--data", "digits"], "'nosuchnet'"),
        (["resnet18", "--data", "digit"], "'digit'"),
        (["resnet18"], "--data"),
        (["resnet18", "--data", "digits", "--epochs", "0"], "^--epochs: .*got 0"),
        (["resnet18", "--data", "digits", "--optimizer-options", "3"], "^--optimizer-options: .*got 3"),
        (["resnet18", "--data", "digits", "--arg", "wings"], "NAME=VALUE"),
        (["resnet18", "--data", "digits", "--arg", "wings=2"], "resnet18 can't be built"),
        (["resnet18", "--data", "digits", "--batch-size", "3", "--mixup", "1"], "--batch-size must be even"),
        (["resnet18", "--data", "digits", "--multi-label"], "^--multi-label needs --loss bce or"),
        (["resnet18", "--data", "digits", "--config", "bad.yaml"], r"bad.yaml: batch_size: .*; lr: "),
        (["resnet18", "--data", "digits", "--config", "none.yaml"], "none.yaml can't be read"),
        (["--lr", "3", "--resume", str(tmp_path)], "remove lr, output"),
    ]:
        with pytest.raises(RetrofitError, match=says):
            run("finetune", *arguments, "--output", tmp_path / "run")
    for folder, says in ((".", "no run"), ("python", "from Python"), ("binary", "run.yaml"), ("odd", "run.yaml")):
        with pytest.raises(RetrofitError, match=says):
            run("finetune", "--resume", tmp_path / folder)
    assert not (tmp_path / "run").exists()
    pictures = make_folder(Path("pictures"))
    for words in (["finetune", "test_resnet"], ["compare", "test_resnet"], ["fold", tmp_path]):
        with pytest.raises(RetrofitError, match=r"pictures/runs/1 .*--output"):
            run(*words, "--data", pictures, "--output", pictures / "runs" / "1")
    assert not (pictures / "runs").exists()


def test_another_experiment_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compare goes on with what its folder holds: with other weights, SE or recipe it must not find this one's."""
    monkeypatch.chdir(tmp_path)
    folders: list[Path] = []

    def noted(*_: object, output_dir: Path, **__: object) -> str:
        folders.append(output_dir)
        return "a comparison"

    monkeypatch.setattr(se_retrofit.finetune, "compare", noted)
    torch.save(Base.of("test_resnet", num_classes=10).build().state_dict(), "weights.pth")
    start = ["compare", "test_resnet", "--data", "digits", *SMALL]
    variants = [
        [], ["--checkpoint", "weights.pth"], ["--pretrained"], ["--placement", "identity"], ["--arg", "act_layer=gelu"],
        ["--epochs", "3"], ["--image-size", "24"],
    ]  # fmt: skip
    for variant in [*variants, []]:
        run(*start, *variant)
    assert folders[-1] == folders[0]
    assert len(set(folders)) == len(variants)


@pytest.mark.sweep
def test_compare_prints_and_writes(tmp_path: Path) -> None:
    said = run("compare", "timm/test_resnet", *DIGITS, "--seeds", "2", "--output", tmp_path, "--arms", "plain,cbam")
    for piece in ("without SE", "with CBAM", "seed 1, accuracy %", "ms per step", "parameters", "2 seeds, 360 images"):
        assert piece in said
    assert (tmp_path / "comparison.json").exists()


@pytest.mark.usefixtures("drawn_pictures")
def test_find_lr_prints_draws_and_writes(tmp_path: Path) -> None:
    few = ["--image-size", "16", "--batch-size", "32", "--cpu", "--steps", "10", "--lowest", "1e-5"]
    files = ["--plot", tmp_path / "lr.png", "--output", tmp_path / "lr.json"]
    said = run("find-lr", "timm/test_resnet", "--data", "digits", *few, *files, "--trainable", "se+head")
    found = json.loads((tmp_path / "lr.json").read_text())
    assert len(found["rates"]) == 10
    assert found["rates"][0] == pytest.approx(1e-5)
    assert "1.00e+00" in said
    assert (tmp_path / "lr.png").stat().st_size > 1000
