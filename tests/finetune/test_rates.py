"""How fast each parameter learns: SE's layers the more slowly, the more inputs they have; and find_lr, which looks for the rate."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from networks import random_states
from timm.models.resnet import BasicBlock, ResNet
from tiny import config, digits, network, same, state_of, trained
from torch import nn
from torch.utils.data import TensorDataset

from se_retrofit import RetrofitError, SEAttention, add_se
from se_retrofit.finetune import FinetuneConfig, find_lr, load_data, param_groups
from se_retrofit.finetune import rates as rates_module
from se_retrofit.finetune.learning import fans_in, scaled_groups, se_pace
from se_retrofit.finetune.rates import learning_rates


def wide_network(attention: str = "se") -> nn.Module:
    """Blocks of 8, 8, 16 and 64 channels; their SE's layers have as many inputs, and half as many."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 64), num_classes=10, zero_init_last=False)
    return add_se(model, reduction=2, attention=attention)


def movement(channels: int, lr: float, scaled: bool = True) -> float:
    """How far the gates are from 1 after two updates of Adam whose gradients ask for more of everything."""
    torch.manual_seed(0)
    se = SEAttention(channels, reduction=8, gate="identity")
    optimizer = torch.optim.Adam(param_groups(se, lr) if scaled else se.parameters(), lr=lr)
    x = torch.rand(8, channels, 2, 2)
    for _ in range(2):
        optimizer.zero_grad()
        (-se(x).sum()).backward()
        optimizer.step()
    return float((se.gates(x).detach() - 1).abs().mean())


@pytest.mark.parametrize("lr", [2e-4, 1e-2])
def test_gates_move_alike_at_every_width_and_no_faster_than_a_norm_s_scale(lr: float) -> None:
    narrow, wide = (movement(channels, lr) for channels in (128, 4096))
    assert wide == pytest.approx(narrow, rel=0.2)
    assert narrow < 2 * 1e-2  # as far as two updates at a rate that norms bear move a scale
    assert lr < 1e-2 or movement(4096, lr, scaled=False) > 0.9  # of at most 1: saturated by two updates


def test_at_low_rates_gates_move_faster_than_the_rest_so_that_a_short_run_moves_them() -> None:
    assert movement(1024, 2e-4) > 3 * 2e-4
    assert [64 * se_pace(64, lr) for lr in (1e-4, 6e-4, 1e-3, 1e-2, 0.1)] == pytest.approx([16, 16, 10, 1, 1])
    assert se_pace(4, 2e-4) == 1 == se_pace(1, 0.1)  # never faster than the rest's weights
    assert {group["lr"] for group in param_groups(wide_network(), 0.0)} == {0.0}  # as a warm-up of one's own may begin


def test_a_layer_is_scaled_by_its_own_fan_in_whatever_module_it_is_in() -> None:
    layers = {"eca": nn.Conv1d(1, 1, 5, bias=False), "spatial": nn.Conv2d(2, 1, 7), "norm": nn.LayerNorm(64)}
    attention = nn.ModuleDict({**layers, "wide": nn.Linear(64, 8, bias=False)})
    attention.factor = nn.Parameter(torch.ones(512))
    inputs = fans_in(attention)
    assert {name: inputs[id(parameter)] for name, parameter in attention.named_parameters()} == {
        "factor": 1, "eca.weight": 5, "spatial.weight": 98, "spatial.bias": 98, "norm.weight": 1, "norm.bias": 1, "wide.weight": 64
    }  # fmt: skip


def test_static_factors_learn_at_the_full_rate_and_so_do_all_other_parameters() -> None:
    groups = scaled_groups(wide_network(attention="static"), 1e-3, 0.1, 3.0, 5.0)
    assert {(g["name"], g["lr_scale"]) for g in groups} == {("se", 3.0), ("head", 5.0), ("body", 1.0)}


def test_layers_of_one_rate_share_a_group_and_the_run_tells_the_rates(capsys: pytest.CaptureFixture[str]) -> None:
    trained(wide_network(), digits().val, recipe={"se_lr_scale": 2.0, "head_lr_scale": 5.0}, quiet=False)
    groups = scaled_groups(wide_network(), 1e-3, 0.05, 2.0, 5.0)
    se = [(group["lr_scale"], len(group["params"])) for group in groups if group["name"] == "se"]
    expected = {4: 2, 8: 3, 16: 1, 32: 1, 64: 1}
    assert sorted(se) == sorted((2 * se_pace(inputs, 1e-3), tensors) for inputs, tensors in expected.items())
    assert Counter(group["name"] for group in groups) == {"se": 5, "head": 2, "body": 2}
    assert sum(len(group["params"]) for group in groups) == len(list(wide_network().parameters()))
    told = "learning rates at their peak: body 1.00e-03; head 5.00e-03; SE 3.13e-04 to 2.00e-03, by the fan-in of its layers"
    assert told in capsys.readouterr().out.splitlines()


def test_a_run_whose_parameters_were_divided_otherwise_is_not_resumed(tmp_path: Path) -> None:
    trained(wide_network(), digits().val, output_dir=tmp_path)
    file = tmp_path / "last" / "training.json"
    whole, model = file.read_text(), wide_network()
    file.write_text(whole.replace("se at 0.1562 lr", "se at 5 lr"))  # as an earlier version had it
    assert file.read_text() != whole
    before = state_of(model)
    with pytest.raises(RetrofitError, match=r"parameter groups, se at 0\.1562 lr.*None then, 1 now.*se at 5 lr"):
        trained(model, digits().val, recipe={"epochs": 2}, output_dir=tmp_path, resume=True)
    assert same(before, model.state_dict())


def test_an_optimizer_of_ones_own_gets_the_rates_that_finetune_has_and_norms_no_decay() -> None:
    model = wide_network()
    groups = param_groups(model, 1e-3, weight_decay=0.1, se_lr_scale=2.0)
    scaled = scaled_groups(model, 1e-3, 0.1, 2.0, 5.0)
    assert [group["lr"] for group in groups] == [1e-3 * group["lr_scale"] for group in scaled]
    for own, other in zip(groups, scaled, strict=True):
        assert own["weight_decay"] == other["weight_decay"] == 0.1 * (own["params"][0].ndim > 1)
        assert len({p.ndim > 1 for p in own["params"]}) == 1
        assert len(own["params"]) == len(other["params"])
        assert set(own) == {"params", "lr", "weight_decay", "name"}  # timm's schedulers would apply lr_scale once more


def test_with_layer_decay_layers_learn_the_more_slowly_the_further_they_are_from_the_head() -> None:
    model = network()
    groups = scaled_groups(model, 1e-2, 0.1, 5.0, 2.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert scale[id(model.fc.weight)] == 2.0
    depths = [model.conv1, *(layer[0].conv1 for layer in (model.layer1, model.layer2, model.layer3, model.layer4))]
    assert [scale[id(conv.weight)] for conv in depths] == [0.5 ** (5 - depth) for depth in range(5)]
    se = next(p for n, p in model.layer2.named_parameters() if "se_attention" in n)
    assert scale[id(se)] == 5.0 / se.shape[1] * scale[id(model.layer2[0].conv1.weight)]
    with pytest.raises(RetrofitError, match="no layers in Sequential"):
        scaled_groups(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 1e-3, 0.1, 1.0, 1.0, layer_decay=0.7)


# find_lr

PLAIN = FinetuneConfig(
    optimizer="momentum", optimizer_options={"momentum": 0.0}, weight_decay=0.0, clip_grad=None, label_smoothing=0.0,
    batch_size=64, cpu=True,
)  # fmt: skip


def points() -> TensorDataset:
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def test_the_losses_are_those_of_training_at_the_rates_that_are_told() -> None:
    model = nn.Linear(5, 2)
    found = find_lr(model, points(), config=PLAIN, lowest=0.01, highest=1.0, steps=21)
    assert np.allclose(np.diff(np.log(found.rates)), math.log(100) / 20)
    weights = [p.detach().clone().requires_grad_() for p in (model.weight, model.bias)]
    inputs, targets = points().tensors
    for rate, loss in zip(found.rates, found.losses, strict=True):
        expected = F.cross_entropy(F.linear(inputs, *weights), targets)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        grads = torch.autograd.grad(expected, weights)
        weights = [(p - rate * grad).detach().requires_grad_() for p, grad in zip(weights, grads, strict=True)]


def test_each_layer_is_trained_at_its_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[float, float]]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append({(group["fan_in"], group["lr"]) for group in self.param_groups if group.get("name") == "se"})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    found = find_lr(wide_network(), digits().val, config=config(trainable="se"), steps=10)
    for rate, groups in zip(found.rates, seen[-10:], strict=True):
        assert dict(groups) == pytest.approx({inputs: rate * se_pace(inputs, rate) for inputs in (4, 8, 16, 32, 64)})


def test_a_network_and_the_generators_are_left_as_they_were() -> None:
    model = network().eval()
    model.conv1.weight.requires_grad_(False)
    before, states = state_of(model), list(random_states())
    recipe = config(trainable="se+head", mixup=0.4, ema_decay=0.9, num_classes=7, grad_accum_steps=2, batch_size=8)
    train = [(image, target % 7) for image, target in digits(32).train]
    first = find_lr(model, train, config=recipe, steps=10)
    assert list(random_states()) == states
    assert same(model.state_dict(), before)
    assert not model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert find_lr(model, train, config=recipe, steps=10) == first


@pytest.mark.sweep
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_the_suggestion_trains_better_than_rates_far_from_it(optimizer: str) -> None:
    def perceptron() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))

    data = load_data("digits", image_size=8)
    recipe = PLAIN.replace(optimizer=optimizer, epochs=2, schedule="constant", warmup_ratio=0.0)
    found = find_lr(perceptron(), data.train, config=recipe, highest=1e3)
    assert found.diverged
    assert found.suggestion is not None
    low, chosen, high = (
        trained(perceptron(), data, recipe={**recipe.to_dict(), "lr": found.suggestion * scale}).history[-1]["val_loss"]
        for scale in (1e-3, 1.0, 1e3)
    )
    assert chosen < 0.7 * min(low, high)


def test_the_suggestion_is_where_the_loss_falls_fastest_whatever_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = np.logspace(-5, 1, 121)
    fall = 2 - 1.5 / (1 + np.exp(-4 * (np.log10(rates) + 2)))  # steepest at 0.01
    rise = np.where(rates > 0.5, 20 * (rates - 0.5), 0)
    noise = 0.01 * np.random.default_rng(0).normal(size=121)
    found = learning_rates(rates.tolist(), (fall + rise + noise).tolist(), True)
    assert found.suggestion == pytest.approx(0.01, rel=0.5)
    assert f"{found.suggestion:.2e}" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["suggestion"] == found.suggestion
    drawn: list[Figure] = []  # the fall fills the picture, whatever the rise
    monkeypatch.setattr(rates_module, "save_figure", lambda figure, file: drawn.append(figure))
    found.plot("lr.png")
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert max(found.losses) > 5 * high
    assert low < 0.5 < 2 < high < 3
    assert 0.5 < axes.get_xlim()[1] < 2


def test_there_is_no_suggestion_where_the_loss_hardly_falls() -> None:
    found = find_lr(nn.Linear(5, 2), points(), config=PLAIN, lowest=1e-9, highest=1e-7, steps=20)
    assert found.suggestion is None
    assert str(found).startswith("no suggestion")
    assert "1.00e-07" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 1.0, "highest": 0.1}, r"lowest=1\.0, highest=0\.1"),
        ({"lowest": 0.0}, r"lowest=0\.0"),
        ({"steps": 5}, "got 5"),
        ({"steps": 20.5}, r"steps must be a positive int, got 20\.5"),
        ({"lowest": 1e20, "highest": 1e30}, r"after \d steps, at a learning rate of 1.\d+e\+2\d"),
    ],
)
def test_wrong_ramps_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((RetrofitError, TypeError), match=message):
        find_lr(nn.Linear(5, 2), points(), config=PLAIN, **options)
