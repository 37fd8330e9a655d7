"""What a run shows: what its gates did in each epoch, what the network was given, and what it got wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import said
from matplotlib.figure import Figure
from sweeps import swept
from tiny import classifier, config, digits, network, rows_in, trained
from torch import nn
from torch.utils.data import DataLoader

from se_retrofit import RetrofitError, SEAttention, add_se
from se_retrofit.finetune import load_data, show_batch
from se_retrofit.finetune import pictures as drawing
from se_retrofit.inspection import excitations


@pytest.mark.usefixtures("drawn_pictures")
@pytest.mark.parametrize("ema_decay", swept([None], [0.5]))
def test_each_epoch_s_row_has_the_gates_on_the_validation_data(ema_decay: float | None, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    recipe = {"epochs": 2, "lr": 3e-3, "ema_decay": ema_decay, "trackers": ("tensorboard",)}
    result = trained(model, recipe=recipe, output_dir=tmp_path)
    sites = [path for path, module in model.named_modules() if isinstance(module, SEAttention)]
    rows = rows_in(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(list(row["gates"]) == sites for row in rows)
    assert all(site["channels"] == [1.0] * 5 for site in rows[0]["gates"].values())  # the retrofit is an identity
    assert rows == result.history
    assert rows[2]["gates"] != rows[1]["gates"]
    # the model now has the weights of the best epoch, and its gates
    best = next(row for row in rows if row["epoch"] == result.best_epoch)
    for site in excitations(model, digits().val).sites:
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
    gate: str, validated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = digits() if validated else digits().train
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    static = add_se(network(se=False), attention="static")
    for module in static.modules():
        if isinstance(module, SEAttention):
            nn.init.constant_(module.factor, 3.0)
    for model in (static, network()):
        assert not any("saturated" in row for row in trained(model, quiet=False).history)
    assert "saturated" not in capsys.readouterr().out
    plain = trained(network(se=False), output_dir=tmp_path)
    assert not any("gates" in row for row in plain.history)
    assert not (tmp_path / "gates.png").exists()


# Pictures


@pytest.fixture
def figures(drawn_pictures: None, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, in the place of files."""
    seen: list[Figure] = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, file: seen.append(figure))
    return seen


def shown(figure: Figure) -> list[tuple[str, torch.Tensor]]:
    return [(a.get_title(), torch.as_tensor(a.get_images()[0].get_array())) for a in figure.axes if a.get_images()]


def test_the_first_batch_is_drawn_in_its_own_colours_with_its_labels(pictures: Path, figures: list[Figure]) -> None:
    model, data = timm.create_model("test_resnet", num_classes=2), load_data(pictures).train
    keys = list(model.state_dict())
    show_batch(model, data, "batch.png", config=config(image_size=32))
    assert len(shown(figures[0])) == 16
    for title, colors in shown(figures[0]):  # of 0 to 60 in noise, and 180 more in one channel
        assert 0 <= colors.min() < colors.max() <= 1
        red, _, blue = colors.mean((0, 1)).tolist()
        assert title == ("red" if red > blue else "blue")
        assert max(red, blue) == pytest.approx(210 / 255, abs=0.05)
    assert list(model.state_dict()) == keys
    show_batch(model, data, "batch.png", config=config(image_size=32, mixup=1.0, num_classes=2))
    assert any(title.count("%") == 2 for title, _ in shown(figures[1]))


@pytest.mark.usefixtures("drawn_pictures")
def test_data_that_are_no_pictures_are_not_drawn(tmp_path: Path) -> None:
    data = [(torch.rand(2, 6), n % 2) for n in range(8)]
    with pytest.raises(RetrofitError, match=r"\(2, 6\)"):
        show_batch(classifier(12, 2), data, tmp_path / "batch.png", config=config())
    with pytest.raises(RetrofitError, match="no folder"):
        show_batch(network(), digits().train, tmp_path / "none" / "batch.png")
    trained(classifier(12, 2), data, data, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "hardest.png").exists()


@pytest.mark.parametrize("loader", swept([True], [False]))
def test_the_images_with_the_highest_losses_of_the_best_epoch_are_drawn(
    loader: bool, figures: list[Figure], tmp_path: Path
) -> None:
    val: Any = DataLoader(digits().val, 7) if loader else digits().val
    model = trained(None, digits().train, val, {"epochs": 2}, output_dir=tmp_path).model.eval()
    images, targets = (torch.stack([torch.as_tensor(item[part]) for item in digits().val]) for part in (0, 1))
    with torch.no_grad():
        logits = model(images)
    losses, order = nn.functional.cross_entropy(logits, targets, reduction="none").topk(16)
    found = shown(figures[0])
    assert len(found) == 16
    low, high = images[order].min(), images[order].max()
    for at, loss, (title, colors) in zip(order.tolist(), losses.tolist(), found, strict=True):
        assert title == f"{targets[at]}\ntaken for {logits[at].argmax()}\nloss {loss:.2f}\nitem {at}"
        torch.testing.assert_close(colors.permute(2, 0, 1), (images[at] - low) / (high - low))


def test_the_command_draws_the_batch_and_trains_nothing(pictures: Path, tmp_path: Path) -> None:
    words = ["finetune", "test_resnet", "--data", pictures, "--image-size", "32", "--cpu", "--workers", "0"]
    said(*words, "--show-batch", tmp_path / "b.png", "--output", tmp_path / "run")
    assert [file.name for file in tmp_path.iterdir()] == ["b.png"]
