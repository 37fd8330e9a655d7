from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from tiny import config, network, same
from torch import nn
from torch.utils.data import TensorDataset

from se_retrofit import RetrofitError, SEAttention, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, NamedData, evaluate, finetune

FINGERPRINT = (
    17  # readings of a data set before the run begins: twice 8 samples, and one that tells whether it is an image
)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def se_keys(model: nn.Module) -> set[str]:
    paths = [name for name, module in model.named_modules() if isinstance(module, SEAttention)]
    return {key for key in model.state_dict() if any(key.startswith(f"{path}.") for path in paths)}


def test_it_learns_and_the_saved_result_predicts_with_the_same_accuracy(digits: NamedData, tmp_path: Path) -> None:
    result = finetune(
        network(), digits.train, digits.val, config=config(epochs=8, lr=3e-3), output_dir=tmp_path, quiet=True
    )
    assert result.best_accuracy is not None
    assert result.best_accuracy > 0.6
    assert result.best_accuracy == max(row["val_accuracy"] for row in result.history[1:])
    assert result.directory == tmp_path / "best"
    again = load_retrofitted(result.directory, base=network(se=False))
    assert evaluate(again, digits.val).accuracy == result.best_accuracy
    # the network that was given has the same weights, those of the best epoch
    assert evaluate(result.model, digits.val).accuracy == result.best_accuracy
    for key, value in again.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[key]), key


def test_the_first_evaluation_is_that_of_the_network_before_the_retrofit(digits: NamedData) -> None:
    before = evaluate(network(se=False), digits.val, config=config())
    result = finetune(network(), digits.train, digits.val, config=config(epochs=1), quiet=True)
    first = {name: value for name, value in result.history[0].items() if name != "gates"}
    assert first == {"epoch": 0, **{f"val_{name}": value for name, value in before.scores().items()}}


@pytest.mark.parametrize(("train", "ema"), [("se", None), ("se+head", 0.9)])
def test_training_se_leaves_all_else_bit_for_bit(digits: NamedData, train: str, ema: float | None) -> None:
    model = network()
    before = state_of(model)
    finetune(model, digits.train, digits.val, config=config(trainable=train, ema_decay=ema), quiet=True)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == se_keys(model) | ({"fc.weight", "fc.bias"} if train == "se+head" else set())
    assert all(p.requires_grad for p in model.parameters())


def test_unfreezing_trains_the_rest_from_that_epoch_on(digits: NamedData, tmp_path: Path) -> None:
    frozen = network()
    recipe = config(trainable="se", epochs=3, unfreeze_epoch=3, schedule="constant")
    body = "layer1.0.conv1.weight"
    before = frozen.state_dict()[body].clone()
    seen = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(torch.equal(frozen.state_dict()[body], before))
            return x

    frozen.maxpool = nn.Sequential(frozen.maxpool, Spy())
    finetune(frozen, digits.train, config=recipe, quiet=True)
    # 8 updates an epoch; the first step of epoch 3 still sees the old weights
    assert seen == [True] * 17 + [False] * 7


@pytest.mark.parametrize("frozen", [True, False])
def test_the_statistics_of_norms_move_unless_they_are_frozen(digits: NamedData, frozen: bool) -> None:
    model = network()
    before = state_of(model)
    finetune(model, digits.val, config=config(freeze_bn=frozen, epochs=1), quiet=True)
    after = model.state_dict()
    statistics = [key for key in before if "running_" in key or "num_batches" in key]
    assert statistics
    assert all(torch.equal(before[key], after[key]) == frozen for key in statistics)
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_flags_modes_and_generators_are_given_back(digits: NamedData) -> None:
    model = network().eval()
    model.conv1.weight.requires_grad_(False)
    model.layer1.train()
    conv = model.conv1.weight.clone()
    modes = [module.training for module in model.modules()]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    finetune(model, digits.train, config=config(epochs=1), quiet=True)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert [module.training for module in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert torch.equal(model.conv1.weight, conv)
    assert "forward" not in vars(model)


def test_the_same_seed_gives_the_same_weights(digits: NamedData) -> None:
    recipe = config(mixup=0.5, cutmix=0.5, ema_decay=0.9, epochs=1)
    a, b, c = network(), network(), network()
    finetune(a, digits.train, digits.val, config=recipe, quiet=True)
    torch.rand(7)
    finetune(b, digits.train, digits.val, config=recipe.replace(workers=2), quiet=True)
    finetune(c, digits.train, digits.val, config=recipe.replace(seed=1), quiet=True)
    assert same(a.state_dict(), b.state_dict())
    assert not same(a.state_dict(), c.state_dict())


def test_accumulating_two_batches_is_one_batch_of_both(digits: NamedData) -> None:
    whole, halves = network(), network()
    recipe = config(epochs=1, freeze_bn=True, optimizer="sgd", lr=5e-3, clip_grad=None)  # clipping would hide a factor
    finetune(whole, digits.train, config=recipe, quiet=True)
    finetune(halves, digits.train, config=recipe.replace(batch_size=16, grad_accum_steps=2), quiet=True)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, halves.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_se_and_head_have_their_own_learning_rate_and_norms_no_decay() -> None:
    from se_retrofit.finetune.groups import param_groups

    model = network()
    groups = param_groups(model, weight_decay=0.1, se_lr_scale=5.0, head_lr_scale=2.0)
    by_kind = {(g["name"], g["weight_decay"]): g for g in groups}
    assert set(by_kind) == {("se", 0.1), ("head", 0.1), ("head", 0.0), ("body", 0.1), ("body", 0.0)}
    assert [by_kind[k]["lr_scale"] for k in (("se", 0.1), ("head", 0.0), ("body", 0.1))] == [5.0, 2.0, 1.0]
    assert all(p.ndim == 1 for p in by_kind["body", 0.0]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_with_layer_decay_layers_learn_the_more_slowly_the_further_they_are_from_the_head() -> None:
    from se_retrofit.finetune.groups import param_groups

    model = network()
    groups = param_groups(model, 0.1, 5.0, 2.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert scale[id(model.fc.weight)] == 2.0
    depths = [model.conv1, *(layer[0].conv1 for layer in (model.layer1, model.layer2, model.layer3, model.layer4))]
    scales = [scale[id(conv.weight)] for conv in depths]
    assert scales == [0.5 ** (5 - depth) for depth in range(5)]
    se = next(p for n, p in model.layer2.named_parameters() if "se_attention" in n)
    assert scale[id(se)] == 5.0 * scale[id(model.layer2[0].conv1.weight)]


def test_layer_decay_is_refused_where_no_layers_are_known() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = TensorDataset(torch.randn(32, 3, 2, 2), torch.arange(32) % 3)
    with pytest.raises(RetrofitError, match="timm finds no layers in Sequential"):
        finetune(model, data, config=config(layer_decay=0.7), quiet=True)


@pytest.mark.sweep
def test_early_stop(digits: NamedData, tmp_path: Path) -> None:
    # so small a rate that nothing gets better
    recipe = config(epochs=20, lr=1e-12, patience=2, freeze_bn=True)
    result = finetune(network(), digits.train, digits.val, config=recipe, output_dir=tmp_path, quiet=True)
    assert result.stopped == "early stop"
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]
    assert result.best_epoch == 1


@pytest.mark.usefixtures("drawn_pictures")
def test_metrics_are_written_as_jsonl_csv_and_a_plot(digits: NamedData, tmp_path: Path) -> None:
    result = finetune(network(), digits.train, digits.val, config=config(), output_dir=tmp_path, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["val_accuracy"]) for row in table] == [row["val_accuracy"] for row in rows]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    updates = [json.loads(line) for line in (tmp_path / "updates.jsonl").read_text().splitlines()]
    assert [u["update"] for u in updates] == list(range(1, 17))
    assert FinetuneConfig.from_yaml(tmp_path / "config.yaml") == config()


def test_it_prints_a_table_with_a_row_for_each_epoch(digits: NamedData, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(network(), digits.train, digits.val, config=config())
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("ResNet, 4 SE modules; ")
    header = next(i for i, line in enumerate(lines) if "val acc" in line)
    assert [line.split()[0] for line in lines[header + 1 : header + 4]] == ["0", "1", "2"]
    assert "best validation accuracy" in lines[-1]


@pytest.mark.sweep
def test_schedule_none_and_others_of_timm(digits: NamedData) -> None:
    for name in ("none", "step", "poly"):
        result = finetune(network(), digits.train, digits.val, config=config(epochs=1, schedule=name), quiet=True)
        assert math.isfinite(result.history[-1]["train_loss"])


def test_a_bar_is_drawn_in_a_terminal(
    digits: NamedData, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    finetune(network(), digits.train, digits.val, config=config())
    said = capsys.readouterr().out
    assert "epoch 2/2" in said
    assert "images/s" in said
    assert "\x1b[" in said


def test_trackers_that_are_not_there_are_named(digits: NamedData) -> None:
    with pytest.raises(RetrofitError, match=r"nosuchtracker"):
        finetune(network(), digits.train, config=config(trackers=["nosuchtracker"]), quiet=True)
    finetune(network(), digits.train, config=config(epochs=1), quiet=True)  # the next run is not in its way


def test_a_network_without_se_is_saved_and_loaded_too(digits: NamedData, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=10)
    data = torch.utils.data.Subset(digits.train, range(32))
    result = finetune(model, data, config=config(epochs=1), output_dir=tmp_path, quiet=True)
    assert result.best_accuracy is None
    assert result.directory is not None
    loaded = load_retrofitted(result.directory)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


# Heads


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "googlenet", "convnext_tiny"])
def test_torchvision_networks_get_a_new_head(name: str) -> None:
    from se_retrofit.finetune import new_head

    kwargs = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **kwargs)
        new_head(model, 7)
        wanted = torchvision.models.get_model(name, weights=None, num_classes=7, **kwargs)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in wanted.state_dict().items()}


def test_a_new_head_for_the_classes_of_the_data(digits: NamedData) -> None:
    model = network()
    finetune(model, digits.train, digits.val, config=config(epochs=1, num_classes=12), quiet=True)
    assert model.fc.out_features == 12
    assert model.num_classes == 12


def test_auxiliary_classifiers_are_trained_too() -> None:
    with torch.random.fork_rng():
        model = torchvision.models.googlenet(weights=None, num_classes=3, init_weights=False)
    before = state_of(model)
    data = TensorDataset(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))
    finetune(model, data, data, config=config(epochs=1, batch_size=4), quiet=True)
    assert not torch.equal(model.aux1.fc2.weight, before["aux1.fc2.weight"])


# Data


# Mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "adamm"}, "timm knows no optimizer 'adamm'"),
        ({"schedule": "cosinus"}, "schedule 'cosinus'"),
        ({"schedule": "plateau"}, "only supports step per epoch"),
        (
            {"schedule": "step", "schedule_options": {"decay_epochs": 0}},
            "schedule 'step' fails with .*ZeroDivisionError",
        ),
        ({"optimizer_options": {"wings": 2}}, "optimizer 'adamw' can't be made"),
        ({"transform_options": {"wings": 2}}, "transform_options"),
        ({"patience": 2}, "patience needs validation data"),
    ],
)
def test_mistakes_in_the_recipe_leave_the_network_as_it_was(
    digits: NamedData, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = network()
    before = state_of(model)
    with pytest.raises(RetrofitError, match=says):
        finetune(model, digits.train, config=config(num_classes=12, **changes), output_dir=tmp_path / "run", quiet=True)
    assert same(before, model.state_dict())


def test_se_cannot_be_trained_where_there_is_none(digits: NamedData) -> None:
    with pytest.raises(RetrofitError, match=r'trainable="se" needs SE modules.*add_se'):
        finetune(network(se=False), digits.train, config=config(trainable="se"), quiet=True)


def test_classes_that_the_network_does_not_have_are_named() -> None:
    data = TensorDataset(torch.randn(32, 3, 16, 16), torch.full((32,), 10))
    with pytest.raises(RetrofitError, match=r"class 10, and the network has classes 0 to 9; num_classes"):
        finetune(network(), data, config=config(), quiet=True)


def test_wrong_types_are_refused(digits: NamedData) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module"):
        finetune("resnet50", digits.train)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config must be a FinetuneConfig"):
        finetune(network(), digits.train, config={"epochs": 3})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"load_data"):
        finetune(network(), "digits", config=config())
    with pytest.raises(RetrofitError, match=r"bare one"):
        finetune(nn.DataParallel(network()), digits.train, config=config())
    with pytest.raises(RetrofitError, match=r"output_dir"):
        finetune(network(), digits.train, config=config(), resume=True)


def test_a_network_without_values_is_refused(digits: NamedData) -> None:
    lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(RetrofitError, match=r"2\.weight has no values yet; call the network once"):
        finetune(lazy, digits.train, config=config(), quiet=True)
    with pytest.raises(RetrofitError, match=r"0\.weight has no values yet"):
        finetune(nn.Sequential(nn.Linear(2, 2, device="meta")), digits.train, config=config(), quiet=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_the_caller_has_gradients_off(digits: NamedData, mode: Callable[[], Any]) -> None:
    expected, model = network(), network()
    finetune(expected, digits.train, config=config(epochs=1), quiet=True)
    with mode():
        finetune(model, digits.train, config=config(epochs=1), quiet=True)
    assert same(model.state_dict(), expected.state_dict())


def test_a_network_that_is_no_classifier_is_refused() -> None:
    data = TensorDataset(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(RetrofitError, match=r"finetune is for classifiers.*shape \(4, 5, 6, 6\)"):
        finetune(nn.Conv2d(3, 5, 3), data, config=config(batch_size=4), quiet=True)


def test_a_loss_that_is_no_longer_finite_stops_and_keeps_the_last_good_checkpoint(
    digits: NamedData, tmp_path: Path
) -> None:
    class Explodes(torch.utils.data.Dataset[Any]):
        """Its 20th batch holds a value that is not finite."""

        def __len__(self) -> int:
            return 256

        def __getitem__(self, index: int) -> Any:
            Explodes.asked += 1
            image, target = digits.train[index]
            return (image * math.inf if Explodes.asked == FINGERPRINT + 19 * 32 + 1 else image), target

        asked = 0

    with pytest.raises(
        RetrofitError, match=r"the loss became nan in epoch 3, update 20 \(number 4 of the epoch\).*last"
    ):
        finetune(network(), Explodes(), config=config(epochs=4), output_dir=tmp_path, quiet=True)
    kept = load_retrofitted(tmp_path / "last", base=network(se=False))
    assert all(torch.isfinite(p).all() for p in kept.parameters())
    state = json.loads((tmp_path / "last" / "training.json").read_text())
    assert state["progress"]["updates"] == 16


def test_weights_that_are_no_longer_finite_are_not_kept(digits: NamedData, tmp_path: Path) -> None:
    recipe = config(epochs=1, optimizer="sgd", lr=1e30, clip_grad=None, warmup_ratio=0.0, schedule="constant")
    with pytest.raises(RetrofitError, match=r"lower lr"):
        finetune(network(), digits.train, config=recipe, output_dir=tmp_path, quiet=True)
    assert not (tmp_path / "last").exists()


def test_a_network_and_a_teacher_whose_train_returns_nothing_are_trained_with(digits: NamedData) -> None:
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    result = finetune(Quiet(), digits.train, digits.val, config=config(epochs=1), teacher=Quiet(), quiet=True)
    assert [row["epoch"] for row in result.history] == [0, 1]
