"""Rows of docs/zoo.csv, the last walk over all names: what a sweep over networks chooses from and compares with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tools.zoo import Row, entries, read_rows, smallest
from tools.zoo.check import CONVERTED

OUT_OF_DATE = "docs/zoo.csv is out of date: python -m tools.zoo --output docs/zoo --fresh"

TABLE = Path(__file__).parents[2] / "docs" / "zoo.csv"


@cache
def listed_rows() -> list[Row]:
    """Those of names that the installed versions have, too."""
    names = {entry.name for entry in entries()}
    rows = [row for row in read_rows(TABLE) if row.name in names]
    assert rows, "docs/zoo.csv is missing: python -m tools.zoo --output docs/zoo"
    return rows


@cache
def smallest_of_each_family() -> list[Row]:
    """The smallest converted network of each family of each library."""
    converted = [row for row in listed_rows() if row.verdict == CONVERTED]
    return smallest(converted, lambda row: (row.name.partition("/")[0], row.family))


def never_refused(row: Row) -> bool:
    """Whether it is a classifier of torchvision: each of them is taken by torch.fx.symbolic_trace and by TorchScript."""
    return row.name.startswith("torchvision/") and "." not in row.family
