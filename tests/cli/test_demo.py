"""The demo keeps what it says: the same function after the surgery, honest numbers, the same run for the same seed."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import pytest
import torch
from command_line import called, said

from se_retrofit.cli.demo import verdict
from se_retrofit.cli.demo_network import SmallResNet
from se_retrofit.retrofit import add_se


@pytest.fixture(autouse=True, scope="module")
def narrow() -> Iterator[None]:
    """The demo's network with fewer channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("se_retrofit.cli.demo_network.SmallResNet", functools.partial(SmallResNet, widths=(8, 12, 32)))
        yield


@pytest.fixture(scope="module")
def output(narrow: None) -> str:
    return said("demo", "--epochs", 1)


def test_it_says_what_was_inserted_and_that_nothing_else_changed(output: str) -> None:
    for stage in range(3):
        for block in range(2):
            assert re.search(rf"stages\.{stage}\.{block} +residual +norm2", output)
    assert "6 SE modules" in output
    assert "Yes, in eval mode: torch.equal on all 3,600 outputs for the 360 validation images." in output
    assert "Yes, in train mode" in output
    assert "Gates: from 1.0 to 1.0." in output


def test_it_prints_accuracies_before_and_after(output: str) -> None:
    row = r"^(trained network|retrofitted, not yet fine-tuned|fine-tuned \w+ SE) .* (\S+)%$"
    rows = dict(re.findall(row, output, re.MULTILINE))
    assert len(rows) == 4
    assert rows["trained network"] == rows["retrofitted, not yet fine-tuned"]
    # one epoch is enough for digits to be far better than chance
    assert all(float(accuracy) > 50 for accuracy in rows.values())


@pytest.mark.sweep
def test_the_same_seed_gives_the_same_run_and_another_seed_another(output: str) -> None:
    runs = [output, *(said("demo", "--epochs", 1, "--seed", seed) for seed in (0, 1))]
    first, again, other = (re.sub(r"\d+ seconds", "", run) for run in runs)
    assert first == again != other


def test_a_retrofit_that_changes_the_outputs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_retrofit.retrofit.add_se", functools.partial(add_se, gate="sigmoid"))
    result = called("demo", "--epochs", 1)
    assert result.exit_code == 1
    assert "outputs differ" in str(result.exception)


@pytest.mark.parametrize(
    ("won", "lost", "said"),
    [
        (0, 0, "the same images are right"),
        (3, 0, "within the noise"),
        (20, 14, "within the noise"),
        (30, 5, "in favour of SE"),
        (5, 30, "in favour of the plain network"),
    ],
)
def test_the_verdict_claims_no_more_than_one_run_shows(won: int, lost: int, said: str) -> None:
    with_se = torch.tensor([True] * won + [False] * lost + [True] * 50 + [False] * 4)
    without = torch.tensor([False] * won + [True] * lost + [True] * 50 + [False] * 4)
    assert said in verdict(with_se, without)
