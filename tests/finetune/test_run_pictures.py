"""The pictures of images, by which a person sees what the network is given and what it gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import said
from matplotlib.figure import Figure
from tiny import config, network, state_of, trained
from torch.utils.data import DataLoader

from se_retrofit import RetrofitError
from se_retrofit.finetune import NamedData, load_data, show_batch
from se_retrofit.finetune import pictures as drawing

pytestmark = pytest.mark.usefixtures("drawn_pictures")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, in the place of files."""
    seen: list[Figure] = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, file: seen.append(figure))
    return seen


def shown(figure: Figure) -> list[tuple[str, torch.Tensor]]:
    return [(a.get_title(), torch.as_tensor(a.get_images()[0].get_array())) for a in figure.axes if a.get_images()]


def test_the_first_batch_is_drawn_in_its_own_colours_with_its_labels(pictures: Path, figures: list[Figure]) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    before = state_of(model)
    show_batch(model, load_data(pictures).train, "batch.png", config=config(image_size=32))
    assert len(shown(figures[0])) == 16
    for title, colors in shown(figures[0]):  # of 0 to 60 in noise, and 180 more in one channel
        assert 0 <= colors.min() < colors.max() <= 1
        red, _, blue = colors.mean((0, 1)).tolist()
        assert title == ("red" if red > blue else "blue")
        assert max(red, blue) == pytest.approx(210 / 255, abs=0.05)
    assert state_of(model).keys() == before.keys()
    show_batch(model, load_data(pictures).train, "batch.png", config=config(image_size=32, mixup=1.0, num_classes=2))
    assert any(title.count("%") == 2 for title, _ in shown(figures[1]))


def test_data_that_are_no_pictures_are_not_drawn(tmp_path: Path, digits: NamedData) -> None:
    data = [(torch.rand(2, 6), n % 2) for n in range(8)]
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with pytest.raises(RetrofitError, match=r"\(2, 6\)"):
        show_batch(flat, data, tmp_path / "batch.png", config=config())
    with pytest.raises(RetrofitError, match="no folder"):
        show_batch(network(), digits.train, tmp_path / "none" / "batch.png")
    trained(flat, data, data, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "hardest.png").exists()


@pytest.mark.parametrize("loader", [False, True])
def test_the_images_with_the_highest_losses_of_the_best_epoch_are_drawn(
    loader: bool, digits: NamedData, figures: list[Figure], tmp_path: Path
) -> None:
    val: Any = DataLoader(digits.val, 7) if loader else digits.val
    result = trained(network(), digits.train, val, {"epochs": 2}, output_dir=tmp_path)
    with torch.no_grad():
        result.model.eval()
        images, targets = (torch.stack([torch.as_tensor(item[part]) for item in digits.val]) for part in (0, 1))
        logits = result.model(images)
        losses, order = torch.nn.functional.cross_entropy(logits, targets, reduction="none").topk(16)
    found = shown(figures[0])
    assert len(found) == 16
    low, high = images[order].min(), images[order].max()
    for at, loss, (title, colors) in zip(order.tolist(), losses.tolist(), found, strict=True):
        assert title.splitlines() == [
            f"{targets[at]}",
            f"taken for {logits[at].argmax()}",
            f"loss {loss:.2f}",
            f"item {at}",
        ]
        torch.testing.assert_close(colors.permute(2, 0, 1), (images[at] - low) / (high - low))


def test_the_command_draws_the_batch_and_trains_nothing(pictures: Path, tmp_path: Path) -> None:
    words = ["finetune", "test_resnet", "--data", pictures, "--image-size", "32", "--cpu", "--workers", "0"]
    said(*words, "--show-batch", tmp_path / "b.png", "--output", tmp_path / "run")
    assert [file.name for file in tmp_path.iterdir()] == ["b.png"]
