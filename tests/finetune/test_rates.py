from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import config, network, same
from torch import nn
from torch.utils.data import Subset, TensorDataset
from typer.testing import CliRunner

from se_retrofit import RetrofitError
from se_retrofit.cli.commands import app
from se_retrofit.finetune import FinetuneConfig, LearningRates, NamedData, find_lr, finetune, load_data
from se_retrofit.finetune.rates import learning_rates

pytestmark = pytest.mark.usefixtures("drawn_pictures")


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


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))


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
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    recipe = config(trainable="se+head", mixup=0.4, ema_decay=0.9, num_classes=7, grad_accum_steps=2, batch_size=16)
    train = [(image, target % 7) for image, target in Subset(digits.train, range(64))]
    first = find_lr(model, train, config=recipe, steps=12)
    assert torch.equal(torch.rand(1), expected)
    assert same(model.state_dict(), before)
    assert not model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert find_lr(model, train, config=recipe, steps=12) == first


@pytest.mark.sweep
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_the_suggestion_trains_better_than_rates_far_from_it(optimizer: str) -> None:
    data = load_data("digits", image_size=8)
    recipe = PLAIN.replace(optimizer=optimizer, epochs=2, schedule="constant", warmup_ratio=0.0)
    found = find_lr(perceptron(), data.train, config=recipe, highest=1e3)
    assert found.diverged
    assert found.suggestion is not None
    losses = {}
    for scale in (1e-3, 1.0, 1e3):
        with_rate = recipe.replace(lr=found.suggestion * scale)
        losses[scale] = finetune(perceptron(), data.train, data.val, config=with_rate, quiet=True).history[-1][
            "val_loss"
        ]
    assert losses[1.0] < 0.7 * losses[1e-3]
    assert losses[1.0] < 0.7 * losses[1e3]


def test_the_suggestion_is_where_the_loss_falls_fastest_whatever_comes_after() -> None:
    rates = np.logspace(-5, 1, 121)
    fall = 2 - 1.5 / (1 + np.exp(-4 * (np.log10(rates) + 2)))  # steepest at 0.01
    rise = np.where(rates > 0.5, 20 * (rates - 0.5), 0)
    noise = 0.01 * np.random.default_rng(0).normal(size=121)
    found = learning_rates(rates.tolist(), (fall + rise + noise).tolist(), True)
    assert found.suggestion == pytest.approx(0.01, rel=0.5)


def test_there_is_no_suggestion_where_the_loss_hardly_falls() -> None:
    found = find_lr(nn.Linear(5, 2), points(), config=PLAIN, lowest=1e-9, highest=1e-7, steps=20)
    assert found.suggestion is None
    assert str(found).endswith("no suggestion: the loss hardly fell up to 1.00e-07")
    assert "steepest" not in str(found)


def test_table_picture_and_plain_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = find_lr(nn.Linear(5, 2), points(), config=PLAIN, lowest=1e-3, highest=100, steps=60)
    assert isinstance(found, LearningRates)
    lines = str(found).splitlines()
    (marked,) = [line for line in lines if line.endswith("<- steepest")]
    assert marked.split()[0] == f"{found.suggestion:.2e}"
    assert 20 <= len(lines) <= 24
    assert json.loads(json.dumps(found.to_dict()))["suggestion"] == found.suggestion
    for name in ("lr.png", "lr.svg"):
        assert found.plot(tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 1.0, "highest": 0.1}, r"0 < lowest < highest, got lowest=1.0, highest=0.1"),
        ({"lowest": 0.0}, r"0 < lowest < highest"),
        ({"steps": 5}, r"steps=10 at least, got 5"),
        ({"lowest": 1e20, "highest": 1e30}, r"the loss diverged after \d steps, at a learning rate of 1.\d+e\+2\d: begin lower"),
    ],
)  # fmt: skip
def test_wrong_ramps_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RetrofitError, match=message):
        find_lr(nn.Linear(5, 2), points(), config=PLAIN, **options)


def test_from_the_command_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        [
            "find-lr", "timm/test_resnet", "--data", "digits", "--image-size", "16", "--cpu", "--steps", "10",
            "--lowest", "1e-5", "--trainable", "se+head", "--plot", str(tmp_path / "lr.png"), "--output", str(tmp_path / "lr.json"),
        ],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "lr.json").read_text())
    assert len(found["rates"]) == 10
    assert found["rates"][0] == pytest.approx(1e-5)
    assert f"{found['losses'][0]:.4f}" in result.output
    assert (tmp_path / "lr.png").stat().st_size > 1000
