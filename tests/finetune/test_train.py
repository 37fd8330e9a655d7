from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import random_states, se_keys
from sweeps import swept
from tiny import Finished, Items, classifier, config, digits, network, progress_in, rows_in, same, state_of, trained
from torch import nn
from torch.utils.data import TensorDataset

from se_retrofit import RetrofitError, load_retrofitted
from se_retrofit.finetune import Callbacks, FinetuneConfig, evaluate, finetune, new_head
from se_retrofit.finetune.parts import is_norm

# readings of a data set before the run begins: twice 8 samples, and one that tells whether it is an image
FINGERPRINT = 17


def test_it_learns_and_the_saved_result_predicts_with_the_same_accuracy(tmp_path: Path) -> None:
    data = digits(256, 100)
    result = trained(network(), data, recipe={"epochs": 5, "lr": 3e-3}, output_dir=tmp_path)
    assert result.best_accuracy is not None
    assert result.best_accuracy > 0.6
    assert result.best_accuracy == max(row["val_accuracy"] for row in result.history[1:])
    assert result.directory == tmp_path / "best"
    again = load_retrofitted(result.directory, base=network(se=False))
    assert evaluate(again, data.val).accuracy == result.best_accuracy
    # the network that was given has the same weights, those of the best epoch
    assert same(again.state_dict(), result.model.state_dict())


@pytest.mark.parametrize(("train", "ema"), [("se", None), ("se+head", 0.9), ("head", None), ("norms+head", None)])
def test_training_a_part_leaves_all_else_bit_for_bit(train: str, ema: float | None) -> None:
    model = network()
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    parts = {
        "se": se_keys(model),
        "head": {"fc.weight", "fc.bias"},
        "norms": {key for key in model.state_dict() if key.rpartition(".")[0] in norms},
    }
    before = state_of(model)
    trained(model, recipe={"epochs": 2, "trainable": train, "ema_decay": ema})
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set().union(*(parts[part] for part in train.split("+")))
    assert all(p.requires_grad for p in model.parameters())


class Rms(nn.Module):
    """A norm that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (timm.layers.BatchNormAct2d(8), True),
        (timm.layers.LayerNorm2d(8), True),
        (Rms(), True),
        (nn.PReLU(8), False),
        (nn.BatchNorm2d(8, affine=False), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_is_known_by_what_it_does(module: nn.Module, norm: bool) -> None:
    before = state_of(module)
    assert is_norm(module) == norm
    assert same(before, module.state_dict())


def test_unfreezing_trains_the_rest_from_that_epoch_on() -> None:
    body, moved = "layer1.0.conv1.weight", []
    before = state_of(network())[body]
    look = Callbacks(after_update=lambda facts: moved.append(not torch.equal(facts.model.state_dict()[body], before)))
    recipe = {"trainable": "se", "epochs": 3, "unfreeze_epoch": 3, "schedule": "constant", "batch_size": 32}
    trained(data=digits().train, recipe=recipe, callbacks=look)
    assert moved == [False] * 8 + [True] * 4


@pytest.mark.parametrize("frozen", [True, False])
def test_the_statistics_of_norms_move_unless_they_are_frozen(frozen: bool) -> None:
    model = network()
    before = state_of(model)
    trained(model, digits().val, recipe={"freeze_bn": frozen})
    after = model.state_dict()
    statistics = [key for key in before if "running_" in key or "num_batches" in key]
    assert statistics
    assert all(torch.equal(before[key], after[key]) == frozen for key in statistics)
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_flags_modes_and_generators_are_given_back() -> None:
    model = network().eval()
    model.conv1.weight.requires_grad_(False)
    model.layer1.train()
    conv, states = model.conv1.weight.clone(), list(random_states())
    modes = [module.training for module in model.modules()]
    trained(model, digits().val)
    assert list(random_states()) == states
    assert [module.training for module in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert torch.equal(model.conv1.weight, conv)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_same_seed_gives_the_same_weights_whatever_the_callers_generators_workers_and_modes(
    mode: Callable[[], Any],
) -> None:
    few = digits(64)
    recipe = {"mixup": 0.5, "cutmix": 0.5, "ema_decay": 0.9}
    a, b, c = network(), network(), network()
    trained(a, few, recipe=recipe)
    torch.rand(7)
    with mode():
        trained(b, few, recipe={**recipe, "workers": 2})
    trained(c, few, recipe={**recipe, "seed": 1})
    assert same(a.state_dict(), b.state_dict())
    assert not same(a.state_dict(), c.state_dict())


def test_accumulating_two_batches_is_one_batch_of_both() -> None:
    whole, halves = network(), network()
    recipe = {"freeze_bn": True, "optimizer": "sgd", "lr": 5e-3, "clip_grad": None}  # clipping would hide a factor
    trained(whole, recipe=recipe)
    trained(halves, recipe={**recipe, "batch_size": 8, "grad_accum_steps": 2})
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, halves.state_dict()[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["none", *swept([], ["step", "poly"])])
def test_it_stops_early_where_nothing_gets_better(schedule: str) -> None:
    # so small a rate that nothing gets better
    recipe = {"epochs": 20, "lr": 1e-12, "patience": 2, "freeze_bn": True, "schedule": schedule}
    result = trained(None, digits().val, digits().val, recipe)
    assert result.stopped == "early stop"
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]
    assert result.best_epoch == 1


def test_a_run_prints_a_table_and_writes_metrics_and_recipe(finished: Finished) -> None:
    lines, result = finished.said, finished.result
    assert lines[0].startswith("ResNet, 4 SE modules; ")
    header = next(i for i, line in enumerate(lines) if "val acc" in line)
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["0", "1"]
    assert any("ResNet does not tell the name" in line and "base=network" in line for line in lines[:header])
    assert any(f"best validation accuracy {result.best_accuracy:.2%}" in line for line in lines)
    assert rows_in(finished.folder / "metrics.jsonl") == result.history
    assert [row["update"] for row in rows_in(finished.folder / "updates.jsonl")] == list(range(1, 9))
    assert FinetuneConfig.from_yaml(finished.folder / "config.yaml") == finished.config


def test_a_bar_is_drawn_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    trained(data=digits(32), recipe={"epochs": 2}, quiet=False)
    said = capsys.readouterr().out
    for piece in ("epoch 2/2", "images/s", "\x1b["):
        assert piece in said


def test_a_network_without_se_is_saved_and_loaded_too(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    result = trained(model, digits(32).train, output_dir=tmp_path)
    assert result.best_accuracy is None
    assert result.directory is not None
    assert same(load_retrofitted(result.directory).state_dict(), model.state_dict())


# Heads


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "googlenet", "convnext_tiny"])
def test_torchvision_networks_get_a_new_head(name: str) -> None:
    kwargs = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **kwargs)
        new_head(model, 7)
        wanted = torchvision.models.get_model(name, weights=None, num_classes=7, **kwargs)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in wanted.state_dict().items()}


@pytest.mark.sweep
def test_auxiliary_classifiers_are_trained_too() -> None:
    with torch.random.fork_rng():
        model = torchvision.models.googlenet(weights=None, num_classes=3, init_weights=False)
    before = state_of(model)
    data = TensorDataset(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))
    trained(model, data, data, {"batch_size": 4})
    assert not torch.equal(model.aux1.fc2.weight, before["aux1.fc2.weight"])


# Mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": "adamm"}, "'adamm'"),
        ({"optimizer": "adahessian"}, "'adahessian'.*gradients alone"),
        ({"optimizer": "adafactorbv"}, "state of optimizer 'adafactorbv'"),
        ({"optimizer_options": {"wings": 2}}, "'adamw' can't be made.*wings"),
        ({"optimizer_options": {"foreach": True, "fused": True}}, "'adamw' can't be made"),
        ({"schedule": "cosinus"}, "'cosinus'"),
        ({"schedule": "plateau"}, "'plateau'"),
        ({"schedule": "step", "schedule_options": {"decay_epochs": 0}}, "'step' fails.*ZeroDivisionError"),
        ({"transform_options": {"wings": 2}}, "transform_options.*wings"),
        ({"transform_options": {"scale": "small"}}, "transform_options.*small"),
        ({"patience": 2}, "patience"),
        ({"trackers": ["nosuchtracker"]}, "nosuchtracker"),
    ],
)
def test_mistakes_in_the_recipe_leave_the_network_as_it_was(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = network()
    before = state_of(model)
    with pytest.raises(RetrofitError, match=says):
        trained(model, digits().train, recipe={"num_classes": 12, **changes}, output_dir=tmp_path / "run")
    assert same(before, model.state_dict())


LAZY = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
BROKEN = network()
nn.init.constant_(BROKEN.fc.bias, math.nan)


@pytest.mark.parametrize(
    ("model", "error", "says", "options"),
    [
        ("resnet50", TypeError, "model must be an nn.Module", {}),
        (network(), TypeError, "config must be a FinetuneConfig", {"config": {"epochs": 3}}),
        (network(), TypeError, "load_data", {"train_data": "digits"}),
        (nn.DataParallel(network()), RetrofitError, "DataParallel", {}),
        (network(), RetrofitError, "output_dir", {"resume": True}),
        (network(se=False), RetrofitError, 'trainable="se".*add_se', {"config": config(trainable="se")}),
        (LAZY, RetrofitError, r"2\.weight has no values", {}),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), RetrofitError, r"0\.weight has no values", {}),
        (nn.Conv2d(3, 5, 3), RetrofitError, r"shape \(16, 5, 14, 14\)", {}),
        (nn.Flatten(), RetrofitError, "no parameter", {}),
        (BROKEN, RetrofitError, r"fc\.bias .* before any training", {}),
        (classifier(768, 10), RetrofitError, "Sequential has no set_grad", {"config": config(grad_checkpointing=True)}),
        (network(), TypeError, "must be Callbacks", {"callbacks": print}),
        (network(), TypeError, r"stop must be an event, .*got 'now'", {"stop": "now"}),
        (network(), TypeError, "function", {"criterion": "focal"}),
        (network(), TypeError, "function", {"criterion": nn.CrossEntropyLoss}),
        (network(), RetrofitError, "has parameters", {"criterion": nn.Bilinear(2, 2, 1)}),
        (BROKEN, RetrofitError, "own teacher", {"teacher": BROKEN}),
        (network(), RetrofitError, "the same classes", {"teacher": classifier(3 * 16 * 16, 3)}),
        (network(), RetrofitError, "distillation .*'half'", {"teacher": network(), "distillation": "half"}),
        (network(), RetrofitError, r"distillation .*1\.5", {"teacher": network(), "distillation": (1.5, 4.0)}),
    ],
)
def test_what_cannot_be_trained_is_refused(model: Any, error: type, says: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=says):
        finetune(model, **{"train_data": digits().train, "config": config(), "quiet": True, **options})


def test_images_that_are_not_finite_stop_the_run_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    asked = itertools.count(1)

    def item(index: int) -> Any:
        image, target = digits().train[index]
        return (image * math.inf if next(asked) == FINGERPRINT + 11 * 16 + 1 else image), target

    model = network()
    with pytest.raises(RetrofitError, match=r"images .* in epoch 2, update 12 \(number 4 of the epoch\).*last"):
        trained(model, Items(128, item), recipe={"epochs": 3, "log_every": 6}, output_dir=tmp_path)
    kept = load_retrofitted(tmp_path / "last", base=network(se=False))
    assert all(torch.isfinite(p).all() for net in (kept, model) for p in net.state_dict().values())
    assert progress_in(tmp_path)["updates"] == 8


@pytest.mark.parametrize(("most", "accumulated", "lengths"), [(12, 1, [8, 4]), (6, 2, [4, 2]), (99, 1, [8] * 3)])
def test_a_run_ends_after_max_updates_and_its_schedule_with_it(
    most: int, accumulated: int, lengths: list[int], tmp_path: Path
) -> None:
    recipe = {"epochs": 3, "max_updates": most, "grad_accum_steps": accumulated, "warmup_ratio": 0.0}
    result = trained(recipe=recipe, output_dir=tmp_path)
    rows = rows_in(tmp_path / "updates.jsonl")
    assert [sum(row["epoch"] == epoch + 1 for row in rows) for epoch in range(len(lengths))] == lengths
    assert (result.updates, len(result.history)) == (sum(lengths), len(lengths) + 1)
    assert result.stopped == ("updates" if most < 99 else "epochs")
    assert rows[0]["lr"] == pytest.approx(5e-4 * (1 + math.cos(math.pi / sum(lengths))), rel=1e-6)
    assert rows[-1]["lr"] == pytest.approx(0)
    assert trained(recipe=recipe, output_dir=tmp_path, resume=True).history == result.history


def test_a_loss_that_is_not_finite_is_told_with_its_update_whenever_it_is_looked_at() -> None:
    calls = itertools.count(1)

    def criterion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.mean() * (math.nan if next(calls) >= 3 else 1)

    with pytest.raises(RetrofitError, match=r"loss became nan in epoch 1, update 3 .*lower lr"):
        trained(recipe={"log_every": 100}, criterion=criterion)


def test_weights_that_are_no_longer_finite_are_not_kept(tmp_path: Path) -> None:
    recipe = {"optimizer": "sgd", "lr": 1e30, "clip_grad": None, "warmup_ratio": 0.0, "schedule": "constant"}
    model = network()
    before = state_of(model)
    with pytest.raises(RetrofitError, match=r"lower lr.* began with"):
        trained(model, digits().train, recipe=recipe, output_dir=tmp_path)
    assert not (tmp_path / "last").exists()
    assert same(before, model.state_dict())


def test_infinite_masks_extra_state_and_a_train_that_returns_nothing_are_taken() -> None:
    class Unusual(nn.Sequential):
        state: Any = None

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None:
            self.state = state

        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    model = Unusual(network())
    model.state = {"seen": 3}
    model.register_buffer("mask", torch.full((2,), -math.inf))
    model.register_buffer("scratch", torch.full((2,), math.nan), persistent=False)
    result = trained(model, recipe={"max_updates": 2}, teacher=Unusual(network()))
    assert [row["epoch"] for row in result.history] == [0, 1]
    assert model.mask.tolist() == [-math.inf] * 2
    assert model.state == {"seen": 3}
