"""Conditions on totals are read as people mean them, and nothing else is."""

from __future__ import annotations

import pytest

from se_retrofit import RetrofitError
from se_retrofit.inspection.conditions import Condition, WrongExpression

TOTALS = {"sites": 16, "skipped": 0, "before": 100, "after": 110, "unknown": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("sites < 16", False),
        ("sites <= 16", True),
        ("sites == 16 and skipped == 0", True),
        ("sites != 16 or skipped", None),
        ("after > 1.05 * before", True),
        ("(after - before) / before > 0.2", False),
        ("not (sites < 8 or after > 2e6)", True),
        ("10 < sites < 12", False),
        ("-sites < -15 and 2 + 3 * 4 == 14", True),
        (" sites<17 ", True),
        ("1 < 2", True),
    ],
)
def test_conditions_hold_as_in_python(text: str, holds: bool | None) -> None:
    if holds is None:
        with pytest.raises(WrongExpression, match=r"'skipped' in .* is a number; a condition is expected there"):
            Condition.read(text, TOTALS)
    else:
        assert Condition.read(text, TOTALS).holds(TOTALS) is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sites", "is a number and no condition; compare it, as in 'sites < 16'"),
        ("", "can't be read"),
        ("sites <", "can't be read"),
        ("sites < 16\nafter < 3", "can't be read"),
        ("site < 16", "no total 'site' in 'site < 16'; there are sites, skipped"),
        ("(sites < 3) + 1 < 2", "'sites < 3' in .* is a condition; a number is expected there"),
        ("sites ** 9 < 3", r"'sites \*\* 9' in .* is not understood; there are numbers, names, \+ - \* /"),
        ("sites in [16]", "is not understood"),
        ("True", "is not understood"),
        ("'a' < 'b'", "is not understood"),
        ("sites.real < 3", "is not understood"),
        ("[s for s in sites]", "is not understood"),
        ("(lambda: sites)() < 3", "is not understood"),
        ("__import__('os').system('true') < 3", "is not understood"),
        ("-" * 400 + "1 < 2", "has 405 characters; at most 300 are read"),
    ],
)
def test_what_is_no_condition_is_refused_when_it_is_read(text: str, message: str) -> None:
    with pytest.raises(WrongExpression, match=message):
        Condition.read(text, TOTALS)


def test_deep_nesting_is_read() -> None:
    assert Condition.read("not " * 70 + "sites < 3", TOTALS).holds(TOTALS) is False
    assert Condition.read("-" * 250 + "1 < 2", TOTALS).holds(TOTALS)


def test_what_is_not_known_is_not_guessed() -> None:
    condition = Condition.read("sites < 3 and unknown > 5", TOTALS)
    with pytest.raises(RetrofitError, match="can't be told: unknown of this network is not known") as caught:
        condition.holds(TOTALS)
    assert not isinstance(caught.value, WrongExpression)
    with pytest.raises(WrongExpression, match="divides by zero for sites = 16, skipped = 0"):
        Condition.read("sites / skipped > 1", TOTALS).holds(TOTALS)
