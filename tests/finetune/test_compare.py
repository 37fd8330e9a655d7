from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from sweeps import swept
from tiny import config, digits, network, rows_in, trained
from torch import nn

from se_retrofit import RetrofitError, has_se
from se_retrofit.finetune import Comparison, Contrast, compare, comparing
from se_retrofit.finetune.comparing import Arm


def comparison(
    plain: list[float], se: list[float], *, images: int = 1000, static: list[float] | None = None
) -> Comparison:
    """Arms of these accuracies, whose wrong answers are the last of the images."""

    def arm(accuracies: list[float]) -> Arm:
        right = torch.stack([torch.arange(images) < round(accuracy * images) for accuracy in accuracies])
        return Arm(accuracies, accuracies, 0.01, 1000, 1000, right)

    named = {"plain": plain, "se": se, "static": static}
    arms = {name: arm(accuracies) for name, accuracies in named.items() if accuracies is not None}
    return Comparison(arms, list(range(len(plain))))


def test_the_interval_takes_its_noise_from_seeds_and_images() -> None:
    from scipy import stats

    a, b = [0.90, 0.92, 0.91, 0.95, 0.93], [0.91, 0.94, 0.91, 0.97, 0.93]
    seeds_alone = stats.ttest_rel(b, a).confidence_interval(0.95)
    contrast = comparison(a, b).contrasts[0]
    assert contrast.difference == pytest.approx(0.01)
    assert contrast.interval is not None
    assert contrast.interval[0] < seeds_alone.low
    assert contrast.interval[1] > seeds_alone.high
    # with many images the seeds' noise is all there is
    low, high = Contrast("se", "plain", contrast.differences, 0.0, 10**9).interval or (0.0, 0.0)
    assert (low, high) == pytest.approx((seeds_alone.low, seeds_alone.high))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Images of differing difficulty, seeds of differing luck, and no effect at all."""
    generator = torch.Generator().manual_seed(0)
    seeds, images, covered = 4, 200, 0
    for _ in range(300):
        hard = torch.rand(images, generator=generator)
        arms = []
        for _ in range(2):
            own = 0.3 * torch.randn(images, generator=generator)  # what this network finds hard, whatever the seed
            luck = 0.1 * torch.randn(seeds, 1, generator=generator)
            right = torch.rand(seeds, images, generator=generator) < (hard + own + luck)
            accuracies = right.double().mean(1).tolist()
            arms.append(Arm(accuracies, accuracies, None, 1, 1, right))
        low, high = Contrast.of("se", arms[1], "plain", arms[0]).interval or (0.0, 0.0)
        covered += low <= 0 <= high
    assert covered >= 0.93 * 300


@pytest.mark.parametrize(
    ("plain", "se", "images", "says"),
    [
        ([0.90, 0.91, 0.92], [0.95, 0.96, 0.971], 100_000, "SE is better"),
        ([0.95, 0.96, 0.971], [0.90, 0.91, 0.92], 100_000, "SE is worse"),
        ([0.90, 0.91, 0.92], [0.92, 0.90, 0.92], 1000, "within the noise"),
        ([0.90, 0.91, 0.92], [0.90, 0.91, 0.92], 1000, "less than one validation image"),
        ([0.90], [0.95], 1000, "One seed tells nothing"),
        ([0.90, 0.90], [0.95, 0.95], 1000, "2 seeds are too few"),
        # quantised accuracies: the same difference for each seed is no proof
        ([0.90, 0.90, 0.90], [0.91, 0.91, 0.91], 100, "within the noise"),
        ([0.900, 0.900, 0.900], [0.901, 0.901, 0.900], 1000, "less than one validation image"),
    ],
)
def test_the_verdict_is_plain(plain: list[float], se: list[float], images: int, says: str) -> None:
    found = comparison(plain, se, images=images)
    assert says in found.contrasts[0].verdict
    assert says in str(found)


def test_se_is_compared_with_as_many_places_without_a_squeeze_and_the_intervals_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(comparing, "save_figure", lambda figure, file: figures.append(figure))
    found = comparison([0.90, 0.91, 0.92], [0.95, 0.96, 0.971], images=100_000, static=[0.949, 0.961, 0.970])
    assert [(c.name, c.other) for c in found.contrasts] == [("se", "plain"), ("static", "plain"), ("se", "static")]
    for contrast, said in zip(found.contrasts, ("better", "better", "within the noise"), strict=True):
        assert said in contrast.verdict
    found.plot(tmp_path / "comparison.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["se - plain", "static - plain", "se - static"]
    lines = [line.get_xdata().tolist() for line in axes.get_lines()[1:]]
    for row, contrast in enumerate(found.contrasts):
        seeds, interval, mean = lines[3 * row : 3 * row + 3]
        assert seeds == pytest.approx([100 * difference for difference in contrast.differences])
        assert interval == pytest.approx([100 * end for end in contrast.interval or ()])
        assert mean == pytest.approx([100 * contrast.difference])


def compared(model: nn.Module, **options: Any) -> Comparison:
    given: dict[str, Any] = {"config": config(), "seeds": 1, "quiet": True}
    return compare(model, digits().train, digits().val, **{**given, **options})


@pytest.mark.parametrize("seeds", swept([1], [2]))
def test_all_arms_start_from_the_same_weights_take_as_many_steps_and_go_on_where_they_were(
    tmp_path: Path, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = network(se=False)
    options = {"config": config(seed=3), "seeds": seeds, "se_options": {"reduction": 4}, "output_dir": tmp_path}
    found = compared(plain, **options)
    assert not has_se(plain)
    assert found.seeds == [3, 4][:seeds]
    assert found.arms["se"].parameters > found.arms["static"].parameters > found.arms["plain"].parameters
    for arm in found.arms.values():
        assert arm.right.shape == (seeds, 50)
        assert arm.right.double().mean(1).tolist() == pytest.approx(arm.accuracies)
    first = [rows_in(tmp_path / f"{arm}-3" / "metrics.jsonl")[0] for arm in ("plain", "se", "static")]
    gates = [row.pop("gates", None) for row in first]
    assert first[0] == first[1] == first[2]  # the evaluation before any step
    assert gates[0] is None
    assert gates[1] == gates[2]  # all 1
    assert (tmp_path / "comparison.png").exists()
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    alone = trained(network(se=False), recipe={"seed": found.seeds[-1]})
    assert alone.best_accuracy == found.arms["plain"].accuracies[-1]

    state = tmp_path / "se-3" / "last" / "training.json"
    written = state.stat().st_mtime_ns
    (tmp_path / "comparison.json").unlink()
    monkeypatch.setattr(comparing, "processes", lambda: (1, 2))  # the other one writes
    again = compared(plain, **options)
    assert not (tmp_path / "comparison.json").exists()
    assert again == found
    assert torch.equal(again.arms["se"].right, found.arms["se"].right)
    assert state.stat().st_mtime_ns == written


def test_norms_or_the_head_alone_are_arms_and_a_plain_network_beside_frozen_ones_trains_its_head() -> None:
    arms = ("plain", "se", "norms", "head")
    found = compared(network(se=False), config=config(trainable="se+head"), arms=arms).arms
    model = network(se=False)
    head = sum(p.numel() for p in model.get_classifier().parameters())
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert found["plain"].accuracies == found["head"].accuracies
    assert found["plain"].trained == head
    assert (found["head"].trained, found["norms"].trained) == (head, head + norms)
    assert found["se"].trained == head + found["se"].parameters - found["plain"].parameters


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": 0}, "at least 1"),
        ({"config": config(trainable="se")}, "trainable"),
        ({"val_data": None}, "validation"),
        *(({"arms": arms}, "arms") for arms in (("se",), ("plain",), ("plain", "bigger"), ("plain", "se", "se"))),
        ({"model": network()}, "give the one without SE"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], says: str) -> None:
    given = {"model": network(se=False), "train_data": digits().train, "val_data": digits().val, "config": config()}
    with pytest.raises(RetrofitError, match=says):
        compare(**{**given, **changes})
