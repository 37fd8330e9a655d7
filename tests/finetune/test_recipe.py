from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig


def test_yaml_keeps_every_field(tmp_path: Path) -> None:
    config = FinetuneConfig(
        epochs=3, lr=1e-4, trainable="se", unfreeze_epoch=2, drop_path=0.1, optimizer_options={"betas": [0.9, 0.95]},
        trackers=("tensorboard",), ema_decay=0.99, channels_last=True, clip_grad=None,
    )  # fmt: skip
    config.to_yaml(tmp_path / "recipe.yaml")
    assert FinetuneConfig.from_yaml(tmp_path / "recipe.yaml") == config
    assert FinetuneConfig.from_yaml(str(tmp_path / "recipe.yaml")) == config
    assert FinetuneConfig.from_yaml(config.to_yaml()) == config


def test_yaml_reads_numbers_without_a_point() -> None:
    assert FinetuneConfig.from_yaml("lr: 1e-4\nepochs: 3\n").lr == 1e-4


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert FinetuneConfig.from_yaml(tmp_path / "empty.yaml") == FinetuneConfig()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"trainable": "head"}, "trainable must be one of 'all', 'se', 'se\\+head', got 'head'"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"bad_images": "ignore"}, "bad_images must be one of"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"ema_decay": 1.0}, "ema_decay must be"),
        ({"warmup_ratio": -0.1}, "warmup_ratio must be"),
        ({"crop_scale": 0.0}, "crop_scale must be"),
        ({"unfreeze_epoch": 3}, "freezes nothing"),
        ({"mixup": 0.2, "batch_size": 7}, "batch_size must be even"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RetrofitError, match=says):
        FinetuneConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"epochs": 1.5}, {"epochs": True}, {"lr": "fast"}, {"freeze_bn": 1}, {"trackers": "wandb"}, {"patience": "3"}],
)
def test_values_of_the_wrong_type_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(fields))} must be"):
        FinetuneConfig(**fields)


def test_an_unknown_field_is_refused_with_close_names() -> None:
    with pytest.raises(RetrofitError, match=r"no field 'epoch'; did you mean epochs"):
        FinetuneConfig.from_yaml("epoch: 3\n")


def test_broken_files_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "type.yaml").write_text("epochs: many\n")
    with pytest.raises(RetrofitError, match=r"no config file"):
        FinetuneConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(RetrofitError, match=r"got list"):
        FinetuneConfig.from_yaml(tmp_path / "list.yaml")
    with pytest.raises(RetrofitError, match=r"can't be read as YAML"):
        FinetuneConfig.from_yaml(tmp_path / "broken.yaml")
    with pytest.raises(RetrofitError, match=r"type\.yaml: epochs must be int"):
        FinetuneConfig.from_yaml(tmp_path / "type.yaml")


def test_replace_checks_the_change() -> None:
    assert FinetuneConfig(epochs=3).replace(lr=1.0).epochs == 3
    with pytest.raises(RetrofitError, match=r"no field"):
        FinetuneConfig().replace(rate=1.0)
