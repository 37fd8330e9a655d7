from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import config, network

from se_retrofit import RetrofitError, has_se
from se_retrofit.finetune import Comparison, NamedData, compare, finetune
from se_retrofit.finetune.compare import Arm, Contrast


def comparison(
    plain: list[float], se: list[float], *, images: int = 1000, static: list[float] | None = None
) -> Comparison:
    """Arms of these accuracies, whose wrong answers are the last of the images."""

    def arm(accuracies: list[float], seconds: float, parameters: int) -> Arm:
        right = torch.stack([torch.arange(images) < round(accuracy * images) for accuracy in accuracies])
        return Arm(accuracies, accuracies, seconds, parameters, right)

    arms = {"plain": arm(plain, 0.010, 1000), "se": arm(se, 0.011, 1100)}
    if static is not None:
        arms["static"] = arm(static, 0.010, 1010)
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
            arms.append(Arm(accuracies, accuracies, None, 1, right))
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


def test_se_is_compared_with_as_many_places_without_a_squeeze() -> None:
    found = comparison([0.90, 0.91, 0.92], [0.95, 0.96, 0.971], images=100_000, static=[0.949, 0.961, 0.970])
    assert [(c.name, c.other) for c in found.contrasts] == [("se", "plain"), ("static", "plain"), ("se", "static")]
    assert [c.verdict.split(":")[0] for c in found.contrasts] == [
        "SE is better", "The static factor is better", "The difference is within the noise",
    ]  # fmt: skip


@pytest.mark.sweep
def test_both_arms_start_from_the_same_weights_and_take_as_many_steps(digits: NamedData, tmp_path: Path) -> None:
    plain = network(se=False)
    found = compare(
        plain, digits.train, digits.val, config=config(epochs=1, seed=3), seeds=2, se_options={"reduction": 4},
        output_dir=tmp_path, quiet=True,
    )  # fmt: skip
    assert not has_se(plain)
    assert found.seeds == [3, 4]
    assert found.arms["se"].parameters > found.arms["static"].parameters > found.arms["plain"].parameters
    for arm in found.arms.values():
        assert arm.right.shape == (2, 100)
        assert arm.right.double().mean(1).tolist() == pytest.approx(arm.accuracies)
    first = [
        json.loads((tmp_path / f"{arm}-3" / "metrics.jsonl").read_text().splitlines()[0])
        for arm in ("plain", "se", "static")
    ]
    gates = [row.pop("gates", None) for row in first]
    assert first[0] == first[1] == first[2]  # the evaluation before any step
    assert gates[0] is None
    assert gates[1] == gates[2]  # all 1
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    alone = finetune(network(se=False), digits.train, digits.val, config=config(epochs=1, seed=4), quiet=True)
    assert alone.best_accuracy == found.arms["plain"].accuracies[1]


def test_a_comparison_goes_on_where_it_was(digits: NamedData, tmp_path: Path) -> None:
    def run() -> Comparison:
        return compare(
            lambda: network(se=False),
            digits.train,
            digits.val,
            config=config(epochs=1),
            seeds=1,
            arms=("plain", "se"),
            output_dir=tmp_path,
            quiet=True,
        )

    first = run()
    written = (tmp_path / "se-0" / "last" / "training.json").stat().st_mtime_ns
    again = run()
    assert again == first
    assert torch.equal(again.arms["se"].right, first.arms["se"].right)
    assert (tmp_path / "se-0" / "last" / "training.json").stat().st_mtime_ns == written


def test_mistakes_are_refused(digits: NamedData) -> None:
    with pytest.raises(RetrofitError, match=r"seeds must be at least 1"):
        compare(network(se=False), digits.train, digits.val, seeds=0)
    with pytest.raises(RetrofitError, match=r"can't be trained with trainable=\"se\""):
        compare(network(se=False), digits.train, digits.val, config=config(trainable="se"))
    with pytest.raises(RetrofitError, match=r"needs validation data"):
        compare(network(se=False), digits.train, None)
    for arms in (("se",), ("plain",), ("plain", "bigger"), ("plain", "se", "se")):
        with pytest.raises(
            RetrofitError, match=r"arms must be 'plain' and one or more of se, static, sigmoid, eca, cbam"
        ):
            compare(network(se=False), digits.train, digits.val, arms=arms)
    with pytest.raises(RetrofitError, match=r"retrofitted already"):
        compare(network(), digits.train, digits.val, config=config())
