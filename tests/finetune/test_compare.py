from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from se_retrofit import RetrofitError, has_se
from se_retrofit.finetune import Comparison, FinetuneConfig, NamedData, compare, finetune
from se_retrofit.finetune.compare import Arm

Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]


def comparison(plain: list[float], se: list[float]) -> Comparison:
    return Comparison(Arm(plain, plain, 0.010, 1000), Arm(se, se, 0.011, 1100), list(range(len(plain))))


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    from scipy import stats

    a, b = [0.90, 0.92, 0.91, 0.95, 0.93], [0.91, 0.94, 0.91, 0.97, 0.93]
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert comparison(a, b).interval == pytest.approx((expected.low, expected.high))
    assert comparison(a, b).difference == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("plain", "se", "says"),
    [
        ([0.90, 0.91, 0.92], [0.95, 0.96, 0.971], "SE is better"),
        ([0.95, 0.96, 0.971], [0.90, 0.91, 0.92], "SE is worse"),
        ([0.90, 0.91, 0.92], [0.92, 0.90, 0.92], "within the noise"),
        ([0.90, 0.91, 0.92], [0.90, 0.91, 0.92], "within the noise"),
        ([0.90], [0.95], "One seed tells nothing"),
    ],
)
def test_the_verdict_is_plain(plain: list[float], se: list[float], says: str) -> None:
    assert says in comparison(plain, se).verdict
    assert says in str(comparison(plain, se))


def test_the_table_holds_all_that_was_asked() -> None:
    printed = str(comparison([0.90, 0.92], [0.91, 0.95]))
    for piece in (
        "91.00 ± 1.41",
        "93.00 ± 2.83",
        "10.0",
        "11.0",
        "1,000",
        "1,100",
        "+2.00 points",
        "95% interval",
        "2 seeds",
    ):
        assert piece in printed


def test_both_arms_start_from_the_same_weights_and_take_as_many_steps(
    network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    plain = network(se=False)
    found = compare(
        plain, digits.train, digits.val, config=config(epochs=1, seed=3), seeds=2, se_options={"reduction": 4},
        output_dir=tmp_path, quiet=True,
    )  # fmt: skip
    assert not has_se(plain)
    assert found.seeds == [3, 4]
    assert found.se.parameters > found.plain.parameters
    first = [
        json.loads((tmp_path / f"{arm}-3" / "metrics.jsonl").read_text().splitlines()[0]) for arm in ("plain", "se")
    ]
    assert first[0] == first[1]  # the evaluation before any step
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    alone = finetune(network(se=False), digits.train, digits.val, config=config(epochs=1, seed=4), quiet=True)
    assert alone.best_accuracy == found.plain.accuracies[1]


def test_a_comparison_goes_on_where_it_was(network: Network, config: Config, digits: NamedData, tmp_path: Path) -> None:
    def run() -> Comparison:
        return compare(
            lambda: network(se=False),
            digits.train,
            digits.val,
            config=config(epochs=1),
            seeds=2,
            output_dir=tmp_path,
            quiet=True,
        )

    first = run()
    written = (tmp_path / "se-1" / "last" / "training.json").stat().st_mtime_ns
    assert run() == first
    assert (tmp_path / "se-1" / "last" / "training.json").stat().st_mtime_ns == written


def test_mistakes_are_refused(network: Network, config: Config, digits: NamedData) -> None:
    with pytest.raises(RetrofitError, match=r"seeds must be at least 1"):
        compare(network(se=False), digits.train, digits.val, seeds=0)
    with pytest.raises(RetrofitError, match=r"can't be trained with train=\"se\""):
        compare(network(se=False), digits.train, digits.val, config=config(train="se"))
    with pytest.raises(RetrofitError, match=r"needs validation data"):
        compare(network(se=False), digits.train, None)
    with pytest.raises(RetrofitError, match=r"retrofitted already"):
        compare(network(), digits.train, digits.val, config=config())
