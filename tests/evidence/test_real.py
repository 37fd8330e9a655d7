"""The second part of docs/evidence.md: its pictures are kept apart, its searches end inside their grid, and its runs are found again."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from benchmarks.evidence import real
from benchmarks.evidence.packages import emoji
from benchmarks.evidence.real import CELLS, RATES_OF_SE, REAL_ARMS, Cell, RealBench, Tuning, cell_runs, features, split
from benchmarks.evidence.real_page import write_real
from benchmarks.evidence.results import Results
from benchmarks.evidence.robustness import grid
from benchmarks.evidence.study import Missing
from benchmarks.evidence.tasks import Part, Task

SIZE = 32


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small network, and noise with two classes, in the place of what the packages hold."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Part:
        labels = torch.arange(count) % 2
        return Part(torch.randn(count, 3, SIZE, SIZE, generator=generator) + labels[:, None, None, None], labels)

    data = Task(part(32), part(8), part(8), classes=2)
    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    monkeypatch.setattr(real, "real_task", lambda name, packages, seed: data)
    monkeypatch.setattr(real, "pretrained", lambda packages: network)
    features.cache_clear()
    return Path("none")


def test_things_are_in_one_part_alone_and_those_to_test_on_are_the_same_for_all_seeds() -> None:
    number = torch.arange(2 * 10 * 2).reshape(2, 10, 2, 1, 1, 1).expand(-1, -1, -1, 3, 1, 1).byte()
    tasks = [split(list(number), seed, train=4, val=2, test=3) for seed in (0, 1)]
    for task in tasks:
        parts = [((p.images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long() for p in (task.train, task.val, task.test)]
        assert sorted(torch.cat(parts).unique().tolist()) == sorted(torch.cat(parts).tolist())
        assert [len(p) for p in parts] == [16, 8, 12]  # both pictures of each thing, for two kinds
        for shown, part in zip(parts, (task.train, task.val, task.test), strict=True):
            assert (shown // 20 == part.labels).all()
            assert (shown[::2] + 1 == shown[1::2]).all()
    assert torch.equal(tasks[0].test.images, tasks[1].test.images)
    assert not torch.equal(tasks[0].train.images, tasks[1].train.images)


def test_emoji_are_cut_out_of_the_sheets_of_both_makers(tmp_path: Path) -> None:
    listed = [
        {"subcategory": "b", "sheet_x": 1, "sheet_y": 0, "has_img_google": True, "has_img_twitter": True},
        {"subcategory": "a", "sheet_x": 0, "sheet_y": 1, "has_img_google": True, "has_img_twitter": False},
    ]
    for vendor, colour in (("google", "red"), ("twitter", "blue")):
        sheet = Image.new("RGBA", (132, 132))
        sheet.paste(Image.new("RGBA", (64, 64), colour), (67, 1))
        png = io.BytesIO()
        sheet.save(png, "PNG")
        files = {"emoji.json": json.dumps(listed).encode(), f"img/{vendor}/sheets/64.png": png.getvalue()}
        with tarfile.open(tmp_path / f"emoji-datasource-{vendor}-1.0.0.tgz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    found = emoji(tmp_path, 16)
    assert {kind: tuple(pictures.shape) for kind, pictures in found.items()} == {"b": (1, 2, 3, 16, 16)}
    assert found["b"][0, :, :, 8, 8].tolist() == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize(("best", "tried"), [(1e-3, 4), (3e-3, 3), (3e-2, 4), (3e-4, 4)])
def test_a_search_goes_on_until_the_best_rate_has_both_its_neighbours(
    best: float, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(tuning: Tuning, packages: Path) -> dict[str, float]:
        return {"accuracy": 1 - abs(torch.tensor(tuning.lr / best).log10().item()), "loss": 0.0}

    monkeypatch.setattr(real, "tune", tune)
    bench = RealBench(Results(tmp_path / "real.jsonl"), tmp_path)
    assert bench.search(Cell("emoji", ("norms",), 1), "norms") == best
    assert len(bench.results.done) == tried


def test_the_rates_that_are_compared_are_those_of_se_alone() -> None:
    arms = {tuning.arm for tuning in grid("adamw", "frozen", "emoji", 1e-3, 0).values()}
    assert arms == {"norms", "norms, statistics kept", "SE, r = 4", "SE, r = 8", "SE, r = 32"}
    model = REAL_ARMS["SE, r = 8"].prepare(timm.create_model("test_resnet"), torch.zeros(1, 3, SIZE, SIZE), 0)
    found: dict[str, dict[str, set[int]]] = {}
    for rates in (RATES_OF_SE, "lr / inputs", "16 lr / inputs", "lr"):
        for group in Tuning("emoji", "", 1e-2, 0, 1, rates=rates).recipe.groups(model, 1e-2):
            found.setdefault(rates, {}).setdefault(group["name"], set()).add(round(1e-2 / group["lr"], 3))
    assert all(of["head"] == {1} for of in found.values())
    assert found["lr"]["se"] == {1}
    assert found[RATES_OF_SE]["se"] == found["lr / inputs"]["se"]  # at 0.01
    assert max(found["lr / inputs"]["se"]) == 16 * max(found["16 lr / inputs"]["se"]) > 16
    assert min(found["16 lr / inputs"]["se"]) == 1


def test_a_cell_s_runs_are_found_again_and_shown(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("noise", ("head", "norms, statistics kept", "static", "SE, r = 8"), 1)
    file, page = tmp_path / "real.jsonl", tmp_path / "page.md"
    done: list[Any] = []
    tune: Callable[..., Any] = real.tune
    monkeypatch.setattr(real, "tune", lambda *given: (done.append(given), tune(*given))[1])
    monkeypatch.setattr(real, "RATES", (3e-4, 1e-3, 3e-3))
    for _ in cell_runs(RealBench(Results(file), small), cell, 2):
        pass
    assert len(done) == len(file.read_text().splitlines())
    bench = RealBench(Results(file))
    for _ in cell_runs(bench, cell, 2):
        pass
    with pytest.raises(Missing, match="has not been carried out"):
        bench.run(cell.tuning("head", 1e-3, 3))
    monkeypatch.setitem(CELLS, "noise, frozen", cell)
    write_real(page, bench, 2)
    (row,) = (line for line in page.read_text().splitlines() if line.startswith("| noise, frozen"))
    assert row.count("±") == 3
    assert (tmp_path / "page-real.svg").exists()


def test_training_the_head_on_kept_features_is_training_it_in_the_network(small: Path) -> None:
    tuning = Tuning("noise", "head", 1e-3, 0, 2)
    quick = real.tune(tuning, small)
    arm, data = REAL_ARMS["head"], real.real_task("noise", small, 0)
    torch.manual_seed(0)
    network = real.pretrained(small)
    base = timm.create_model("test_resnet")
    base.load_state_dict(network.state_dict())
    torch.manual_seed(0)
    base.reset_classifier(2)
    model = arm.prepare(base, data.train.images[:1], 0)
    real.train(model, data.train, epochs=2, lr=1e-3, seed=1, set_modes=arm.set_modes, recipe=tuning.recipe)
    accuracy, loss = real.measured(model, data.test)
    assert quick["accuracy"] == accuracy
    assert quick["loss"] == pytest.approx(loss, rel=1e-4)
    assert real.saturated(model, data.test) is None
