"""A run tells what its gates did in each epoch: in its history, on TensorBoard, and in a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sweeps import swept
from tiny import config, network
from torch import nn

from se_retrofit import SEAttention, add_se
from se_retrofit.finetune import NamedData, finetune
from se_retrofit.inspection import excitations

pytestmark = pytest.mark.usefixtures("drawn_pictures")


@pytest.mark.parametrize("ema_decay", swept([None], [0.5]))
def test_each_epoch_s_row_has_the_gates_on_the_validation_data(
    ema_decay: float | None, digits: NamedData, tmp_path: Path
) -> None:
    model = network()
    recipe = config(epochs=2, lr=3e-3, ema_decay=ema_decay, trackers=("tensorboard",))
    result = finetune(model, digits.train, digits.val, config=recipe, output_dir=tmp_path, quiet=True)
    sites = [path for path, module in model.named_modules() if isinstance(module, SEAttention)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(list(row["gates"]) == sites for row in rows)
    assert all(site["channels"] == [1.0] * 5 for site in rows[0]["gates"].values())  # the retrofit is an identity
    assert rows == result.history
    # the model now has the weights of the best epoch, and its gates
    best = next(row for row in rows if row["epoch"] == result.best_epoch)
    batches = [digits.val[i] for i in range(len(digits.val))]
    for site in excitations(model, [(image[None], label) for image, label in batches]).sites:
        seen = best["gates"][site.path]
        assert (seen["low"], seen["high"]) == (pytest.approx(site.low, abs=1e-5), pytest.approx(site.high, abs=1e-5))
        assert seen["variation"] == pytest.approx(float(site.std.mean()), abs=1e-5)
    assert rows[2]["gates"] != rows[1]["gates"]

    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next(tmp_path.rglob("events.out.tfevents.*"))
    board = EventAccumulator(str(events.parent), {"histograms": 0}).Reload()
    assert set(board.Tags()["histograms"]) == {f"gates/{path}" for path in sites}
    assert len(board.Histograms(f"gates/{sites[0]}")) == 3


def test_a_plain_network_has_no_gates_and_no_picture_of_them(digits: NamedData, tmp_path: Path) -> None:
    plain = network(se=False)
    result = finetune(plain, digits.train, digits.val, config=config(epochs=1), output_dir=tmp_path, quiet=True)
    assert not any("gates" in row for row in result.history)
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "gates.png").exists()


def saturating(model: nn.Module, path: str, share: float) -> nn.Module:
    """With a share of the channels' gates of a site at an end of their range, whatever the input."""
    se = model.get_submodule(path)
    assert isinstance(se, SEAttention)
    count = round(share * se.channel)
    with torch.no_grad():
        for parameter in se.parameters():
            parameter.zero_()
        se.fc[2].bias[:count] = 20.0 * torch.tensor([1.0, -1.0]).repeat(count)[:count]
    return model


def network_with_biases(gate: str = "identity") -> nn.Module:
    return add_se(network(se=False), bias=True, gate=gate)


@pytest.mark.parametrize("gate", ["identity", "sigmoid"])
@pytest.mark.parametrize("validated", [True, False])
def test_sites_with_saturated_gates_are_named_once(
    gate: str, validated: bool, digits: NamedData, capsys: pytest.CaptureFixture[str]
) -> None:
    full, few = "layer4.0.se_attention", "layer3.0.se_attention"
    model = saturating(saturating(network_with_biases(gate), full, 0.25), few, 0.07)
    recipe = config(epochs=2, lr=1e-9, weight_decay=0.0)
    result = finetune(model, digits.train, digits.val if validated else None, config=recipe)
    lines = [line for line in capsys.readouterr().out.splitlines() if "saturated" in line]
    limits = "below 0.05 or above 1.95" if gate == "identity" else "below 0.025 or above 0.975"
    assert lines == [f"gates are saturated, and hardly learn any more: {full} (25%) {limits}. Lower lr or se_lr_scale"]
    assert [row["saturated"] for row in result.history[-2:]] == [{full: 0.25}] * 2
    if validated:
        assert result.history[-1]["gates"][few]["saturated"] == pytest.approx(1 / 16)


def test_static_factors_and_gates_within_their_range_are_never_called_saturated(
    digits: NamedData, capsys: pytest.CaptureFixture[str]
) -> None:
    static = add_se(network(se=False), attention="static")
    for module in static.modules():
        if isinstance(module, SEAttention):
            nn.init.constant_(module.factor, 3.0)
    for model in (static, network()):
        result = finetune(model, digits.train, digits.val, config=config(epochs=1))
        assert not any("saturated" in row for row in result.history)
    assert "saturated" not in capsys.readouterr().out


def test_a_resumed_run_does_not_name_the_sites_again(
    digits: NamedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = "layer4.0.se_attention"
    for epochs, said in ((1, 1), (2, 0)):
        model = saturating(network_with_biases(), full, 0.5)
        recipe = config(epochs=epochs, lr=1e-9)
        finetune(model, digits.train, digits.val, config=recipe, output_dir=tmp_path, resume=True)
        assert capsys.readouterr().out.count("saturated") == said
