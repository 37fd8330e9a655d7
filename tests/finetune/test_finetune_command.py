"""A recipe, and a fine-tune as a program: from the command line, and the examples."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import called
from command_line import said as run
from pictures import make_cifar10, make_folder
from safetensors.torch import load_file
from tiny import same, trained

import se_retrofit.finetune
from se_retrofit import RetrofitError, load_retrofitted, plan_of
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
    assert (plan_of(model).options["placement"], model.fc.out_features) == ("post", 10)
    accuracy = evaluate(model, load_data("digits", image_size=16).val).accuracy
    assert f"best validation accuracy {accuracy:.2%}" in said
    assert FinetuneConfig.from_yaml(output / "config.yaml").num_classes == 10
    assert "resumed" in run("finetune", "--resume", output)
    again.mkdir()
    shutil.copy(output / "run.yaml", again)
    run("finetune", "--resume", again)
    assert same(*(load_file(folder / "best" / "weights.safetensors") for folder in (output, again)))


@pytest.mark.sweep
def test_what_add_wrote_is_fine_tuned_as_it_is(tmp_path: Path) -> None:
    added, output = tmp_path / "added", tmp_path / "run"
    run("add", "timm/test_resnet", "--reduction", "4", "--include", "layer4.*", "--output", added)
    run("finetune", added, *DIGITS, "--output", output)
    again = load_retrofitted(output / "best")
    assert [site.block for site in plan_of(again).sites] == ["layer4.0"]
    assert (plan_of(again).options["reduction"], again.num_classes) == (4, 10)
    assert called("finetune", added, "--reduction", "8", *DIGITS).exit_code == 2  # which add was to say


@pytest.mark.sweep
def test_from_the_command_line_a_result_is_the_model(result: Path, tmp_path: Path) -> None:
    data, output = make_folder(tmp_path / "data", ("blue", "green", "red")), tmp_path / "run"
    said = run("finetune", result, "--data", data, "--epochs", 1, "--batch-size", 8, "--cpu", "--output", output)
    assert "the data has blue, green, red: the head is new" in said
    moved = data.rename(tmp_path / "moved")
    assert "no data" in str(called("finetune", "--resume", output).exception)
    assert "resumed" in run("finetune", "--resume", output, "--data", moved)
    assert "resumed" in run("finetune", "--resume", output)
    data = moved
    assert "15 images: accuracy" in run("evaluate", output, "--data", data, "--cpu")
    assert load_retrofitted(output / "best").fc.out_features == 3


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "digit"], "'digit'"),
        (["--data", "digits", "--optimizer-options", "3"], "^--optimizer-options: .*got 3"),
        (["--data", "digits", "--arg", "wings=2"], "resnet18 can't be built"),
        (["--data", "digits", "--batch-size", "3", "--mixup", "1"], "--batch-size must be even"),
        (["--data", "digits", "--multi-label"], "^--multi-label needs --loss bce or"),
        (["--data", "digits", "--config", "bad.yaml"], r"bad.yaml: batch_size: .*; lr: "),
        (["--data", "digits", "--config", "none.yaml"], "none.yaml can't be read"),
    ],
)
def test_mistakes_are_one_clear_error_that_names_options(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("batch_size: 0\nlr: 0.0\n")
    with pytest.raises(RetrofitError, match=says):
        run("finetune", "resnet18", *arguments, "--output", "run")
    assert not Path("run").exists()
    with pytest.raises(RetrofitError, match="remove lr, output"):
        run("finetune", "--lr", "3", "--resume", ".", "--output", "run")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"holds no run to resume: there is no run\.yaml"),
        (b"command: null\n", "from Python"),
        (b"\xff\xfe", "run.yaml"),
        (b"command: {data: 3}\nconfig: {}\n", "run.yaml"),
    ],
)
def test_a_folder_that_cannot_be_resumed_is_an_error(content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(RetrofitError, match=says):
        run("finetune", "--resume", tmp_path)


@pytest.mark.parametrize("words", [["finetune", "test_resnet"], ["compare", "test_resnet"], ["fold", "."]])
def test_nothing_is_written_into_a_folder_of_pictures(words: list[str], pictures: Path) -> None:
    output = pictures / "runs" / "1"
    with pytest.raises(RetrofitError, match=rf"{output} .*--output"):
        run(*words, "--data", pictures, "--output", output)
    assert not output.parent.exists()


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


# Recipes


def test_yaml_keeps_every_field(tmp_path: Path) -> None:
    config = FinetuneConfig(
        epochs=3, lr=1e-4, trainable="se", unfreeze_epoch=2, optimizer_options={"betas": [0.9, 0.95]},
        trackers=("tensorboard",), ema_decay=0.99, clip_grad=None,
    )  # fmt: skip
    config.to_yaml(tmp_path / "recipe.yaml")
    assert FinetuneConfig.from_yaml(tmp_path / "recipe.yaml") == config
    assert FinetuneConfig.from_yaml(str(tmp_path / "recipe.yaml")) == config
    assert FinetuneConfig.from_yaml(config.to_yaml()) == config
    assert FinetuneConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_yaml_reads_numbers_without_a_point_and_an_empty_file_as_the_defaults(tmp_path: Path) -> None:
    assert FinetuneConfig.from_yaml("lr: 1e-4\nepochs: 3\n").lr == 1e-4
    (tmp_path / "empty.yaml").write_text("")
    assert FinetuneConfig.from_yaml(tmp_path / "empty.yaml") == FinetuneConfig()


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"label_smoothing": 1.0}, {"ema_decay": 1.0}, {"warmup_ratio": -0.1},
        {"layer_decay": 1.5}, {"trainable": "body"}, {"precision": "fp8"}, {"bad_images": "ignore"}, {"loss": "hinge"},
        {"best_metric": "auc"}, {"epochs": 1.5}, {"epochs": True}, {"lr": "fast"}, {"freeze_bn": 1}, {"seed": 2**63}, {"trackers": "wandb"},
        {"patience": "3"}, {"optimizer_options": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_or_of_the_wrong_type_is_named(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(RetrofitError, match=f"^{name}: .*, got {value!r}$"):
        FinetuneConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"unfreeze_epoch": 3}, ["unfreeze_epoch=3", "trainable"]),
        ({"mixup": 0.2, "batch_size": 7}, ["batch_size", "7"]),
        ({"multi_label": True}, ["multi_label", "loss"]),
        ({"multi_label": True, "loss": "bce", "mixup": 0.1}, ["mixup", "multi_label"]),
        ({"balance": "loss", "loss": "bce"}, ["balance", "loss"]),
        ({"best_metric": "map"}, ["best_metric", "multi_label"]),
        ({"best_metric": "top5", "multi_label": True, "loss": "bce"}, ["best_metric", "multi_label"]),
    ],
)
def test_settings_that_contradict_each_other_are_named(fields: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(RetrofitError) as raised:
        FinetuneConfig(**fields)
    assert all(name in str(raised.value) for name in names)


def test_options_that_no_file_can_hold_are_refused_where_a_run_writes_files(tmp_path: Path) -> None:
    recipe = {"transform_options": {"re_prob": torch.tensor(0.0)}}
    with pytest.raises(RetrofitError, match=r"numbers, text, lists and dicts: .*Tensor"):
        trained(recipe=recipe, output_dir=tmp_path)


def test_an_unknown_field_is_refused_with_close_names() -> None:
    for make in (lambda: FinetuneConfig.from_yaml("epoch: 3\n"), lambda: FinetuneConfig().replace(epoch=3)):
        with pytest.raises(RetrofitError, match=r"no field 'epoch'; did you mean epochs"):
            make()


def test_broken_files_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "type.yaml").write_text("epochs: many\n")
    for name, says in [
        ("none", "can't be read"), ("list", "got list"), ("broken", "can't be read as YAML"), ("type", r"type\.yaml: epochs: "),
    ]:  # fmt: skip
        with pytest.raises(RetrofitError, match=says):
            FinetuneConfig.from_yaml(tmp_path / f"{name}.yaml")


def test_the_page_has_all_fields_with_their_defaults() -> None:
    from tools.recipe import PAGE, TABLE, table

    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group() == table(), "write it anew with python -m tools.recipe"
    assert all(f"| `{name}` |" in table() for name in FinetuneConfig.model_fields)


# Examples

EXAMPLES = Path(__file__).parents[2] / "examples"


def best(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("best validation accuracy")).split()[3]


# The arguments of each example, and what its printout must hold
RUNS: dict[str, tuple[list[str], Callable[[str], bool]]] = {
    "finetune_imagefolder.py": (
        ["pictures", "--epochs", "1", "--image-size", "32"],
        lambda said: f"loaded again: {best(said)}" in said,
    ),
    "finetune_cifar10.py": (
        ["--root", ".", "--epochs", "1", "--image-size", "32"],
        lambda said: "in epoch 1, stopped by epochs" in said,
    ),
    "finetune_se_only.py": (["--epochs", "1"], lambda said: said.count(": True") == 2),
    "finetune_multi_gpu.py": (["--epochs", "1", "--image-size", "16"], lambda said: bool(best(said))),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("finetune_*.py")))
def test_each_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, holds = RUNS[name]
    make_folder(tmp_path / "pictures")
    make_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # other images, other sums
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert holds(capsys.readouterr().out)
