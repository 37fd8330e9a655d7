"""torch.jit.script takes the retrofitted network wherever it takes the original: the smallest of each family."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch

from se_retrofit import add_se
from tools.zoo import Entry, Row, entries, read_rows, walk
from tools.zoo.check import CONVERTED, FAILED

ROOT = Path(__file__).parents[2]


def scripted(entry: Entry) -> Row:
    """The row of a network: "failed" where TorchScript takes the original and not the retrofitted network."""
    row = Row(entry.name, entry.family, CONVERTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = entry.build().eval()
        retrofitted = copy.deepcopy(model)  # scripting may leave something behind in what it is given
        try:
            torch.jit.script(model)
        except Exception:
            row.verdict = "the original neither"
            return row
        try:
            torch.jit.script(add_se(retrofitted, inplace=True))
        except Exception as error:
            row.verdict = f"{FAILED}{type(error).__name__}: {str(error)[:300]}"
    return row


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_torchscript_works_wherever_it_works_on_the_original() -> None:
    smallest: dict[tuple[str, str], str] = {}
    for row in sorted(read_rows(ROOT / "docs" / "zoo.csv"), key=lambda row: row.parameters):
        if row.verdict == CONVERTED:
            smallest.setdefault((row.name.partition("/")[0], row.family), row.name)
    rows = list(walk(entries(smallest.values()), jobs=os.cpu_count() or 1, checker=scripted))
    assert sum(row.verdict == CONVERTED for row in rows) > len(rows) / 4
    assert {row.name: row.verdict for row in rows if row.verdict.startswith(FAILED)} == {}
