from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig


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
