from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tiny import config, network, same, state_of
from torch import nn
from torch.utils.data import Subset, TensorDataset

from se_retrofit import RetrofitError
from se_retrofit.finetune import FinetuneConfig, NamedData, find_lr, finetune, load_data
from se_retrofit.finetune import rates as rates_module
from se_retrofit.finetune.rates import learning_rates

PLAIN = FinetuneConfig(
    optimizer="momentum",
    optimizer_options={"momentum": 0.0},
    weight_decay=0.0,
    clip_grad=None,
    label_smoothing=0.0,
    batch_size=64,
    cpu=True,
)


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def test_the_losses_are_those_of_training_at_the_rates_that_are_told() -> None:
    torch.manual_seed(0)
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


def test_a_network_and_the_generators_are_left_as_they_were(digits: NamedData) -> None:
    model = network().eval()
    model.conv1.weight.requires_grad_(False)
    before = state_of(model)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    recipe = config(trainable="se+head", mixup=0.4, ema_decay=0.9, num_classes=7, grad_accum_steps=2, batch_size=8)
    train = [(image, target % 7) for image, target in Subset(digits.train, range(32))]
    first = find_lr(model, train, config=recipe, steps=10)
    assert torch.equal(torch.rand(1), expected)
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
        finetune(perceptron(), data.train, data.val, config=recipe.replace(lr=found.suggestion * scale), quiet=True)
        for scale in (1e-3, 1.0, 1e3)
    )
    for far in (low, high):
        assert chosen.history[-1]["val_loss"] < 0.7 * far.history[-1]["val_loss"]


def test_the_suggestion_is_where_the_loss_falls_fastest_whatever_comes_after() -> None:
    rates = np.logspace(-5, 1, 121)
    fall = 2 - 1.5 / (1 + np.exp(-4 * (np.log10(rates) + 2)))  # steepest at 0.01
    rise = np.where(rates > 0.5, 20 * (rates - 0.5), 0)
    noise = 0.01 * np.random.default_rng(0).normal(size=121)
    found = learning_rates(rates.tolist(), (fall + rise + noise).tolist(), True)
    assert found.suggestion == pytest.approx(0.01, rel=0.5)
    with pytest.MonkeyPatch.context() as patch:  # the fall fills the picture, whatever the rise
        drawn: list[Figure] = []
        patch.setattr(rates_module, "save_figure", lambda figure, file: drawn.append(figure))
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


@pytest.mark.usefixtures("drawn_pictures")
def test_words_picture_and_plain_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = find_lr(nn.Linear(5, 2), points(), config=PLAIN, lowest=1e-3, highest=100, steps=60)
    assert f"{found.suggestion:.2e}" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["suggestion"] == found.suggestion
    for name in ("lr.png", "lr.svg"):
        assert found.plot(tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 1.0, "highest": 0.1}, r"lowest=1\.0, highest=0\.1"),
        ({"lowest": 0.0}, r"lowest=0\.0"),
        ({"steps": 5}, "got 5"),
        ({"lowest": 1e20, "highest": 1e30}, r"after \d steps, at a learning rate of 1.\d+e\+2\d"),
    ],
)
def test_wrong_ramps_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RetrofitError, match=message):
        find_lr(nn.Linear(5, 2), points(), config=PLAIN, **options)
