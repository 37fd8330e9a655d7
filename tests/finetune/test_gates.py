"""A run tells what its gates did in each epoch: in its history, on TensorBoard, and in a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sweeps import swept
from tiny import network, trained
from torch import nn

from se_retrofit import SEAttention, add_se
from se_retrofit.finetune import NamedData
from se_retrofit.inspection import excitations


@pytest.mark.usefixtures("drawn_pictures")
@pytest.mark.parametrize("ema_decay", swept([None], [0.5]))
def test_each_epoch_s_row_has_the_gates_on_the_validation_data(
    ema_decay: float | None, digits: NamedData, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    recipe = {"epochs": 2, "lr": 3e-3, "ema_decay": ema_decay, "trackers": ("tensorboard",)}
    result = trained(model, digits, recipe=recipe, output_dir=tmp_path)
    sites = [path for path, module in model.named_modules() if isinstance(module, SEAttention)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(list(row["gates"]) == sites for row in rows)
    assert all(site["channels"] == [1.0] * 5 for site in rows[0]["gates"].values())  # the retrofit is an identity
    assert rows == result.history
    assert rows[2]["gates"] != rows[1]["gates"]
    # the model now has the weights of the best epoch, and its gates
    best = next(row for row in rows if row["epoch"] == result.best_epoch)
    images = [digits.val[i] for i in range(len(digits.val))]
    for site in excitations(model, [(image[None], label) for image, label in images]).sites:
        seen, measured = best["gates"][site.path], (site.low, site.high, float(site.std.mean()))
        assert (seen["low"], seen["high"], seen["variation"]) == pytest.approx(measured, abs=1e-5)
    for picture in ("gates.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    events = next(tmp_path.rglob("events.out.tfevents.*"))
    board = EventAccumulator(str(events.parent), {"histograms": 0}).Reload()
    assert set(board.Tags()["histograms"]) == {f"gates/{path}" for path in sites}
    assert len(board.Histograms(f"gates/{sites[0]}")) == 3


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


FULL, FEW = "layer4.0.se_attention", "layer3.0.se_attention"


@pytest.mark.parametrize(("gate", "validated"), [("identity", True), ("sigmoid", False)])
def test_sites_with_saturated_gates_are_named_once_also_where_the_run_is_resumed(
    gate: str, validated: bool, digits: NamedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = digits if validated else NamedData(digits.train, None, 10)
    lines = []
    for epochs in (2, 3):
        model = add_se(network(se=False), bias=True, gate=gate)
        model = saturating(saturating(model, FULL, 0.25), FEW, 0.07)
        recipe = {"epochs": epochs, "lr": 1e-9, "weight_decay": 0.0, "batch_size": 64}
        result = trained(model, data, recipe=recipe, output_dir=tmp_path, resume=True, quiet=False)
        lines.append([line for line in capsys.readouterr().out.splitlines() if "gates are saturated" in line])
    limits = "below 0.05 or above 1.95" if gate == "identity" else "below 0.025 or above 0.975"
    assert f"{FULL} (25%) {limits}" in lines[0][0]
    assert FEW not in lines[0][0]
    assert [len(said) for said in lines] == [1, 0]
    assert [row["saturated"] for row in result.history[-2:]] == [{FULL: 0.25}] * 2
    if validated:
        assert result.history[-1]["gates"][FEW]["saturated"] == pytest.approx(1 / 16)


@pytest.mark.usefixtures("drawn_pictures")
def test_static_factors_and_gates_within_their_range_are_never_called_saturated_and_a_plain_network_has_none(
    digits: NamedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    static = add_se(network(se=False), attention="static")
    for module in static.modules():
        if isinstance(module, SEAttention):
            nn.init.constant_(module.factor, 3.0)
    for model in (static, network()):
        assert not any("saturated" in row for row in trained(model, digits, quiet=False).history)
    assert "saturated" not in capsys.readouterr().out
    plain = trained(network(se=False), digits, output_dir=tmp_path)
    assert not any("gates" in row for row in plain.history)
    assert not (tmp_path / "gates.png").exists()
