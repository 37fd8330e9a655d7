"""Whatever traces or compiles an original network's code does so for the retrofitted one."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from se_retrofit import add_se
from se_retrofit.zoo import Entry, Row, entries, read_rows, walk

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]


def _lost(entry: Entry, tool: Callable[[nn.Module], Any]) -> Row:
    """The row of a network: "failed" where the tool takes the original and not the retrofitted network."""
    row = Row(entry.name, entry.family, "converted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = entry.build().eval()
        retrofitted = copy.deepcopy(model)  # a tool may leave something behind in what it is given
        try:
            tool(model)
        except Exception:
            row.verdict = "the original neither"
            return row
        try:
            tool(add_se(retrofitted, inplace=True))
        except Exception as error:
            row.verdict = f"failed: {type(error).__name__}: {str(error)[:300]}"
    return row


def symbolically_traced(entry: Entry) -> Row:
    return _lost(entry, torch.fx.symbolic_trace)


def scripted(entry: Entry) -> Row:
    return _lost(entry, torch.jit.script)


def _failed(names: list[str], checker: Callable[[Entry], Row]) -> dict[str, str]:
    rows = list(walk(entries(names), jobs=os.cpu_count() or 1, checker=checker))
    assert sum(row.verdict == "converted" for row in rows) > len(rows) / 4
    return {row.name: row.verdict for row in rows if row.verdict.startswith("failed")}


def _converted() -> list[Row]:
    return [row for row in read_rows(ROOT / "docs" / "zoo.csv") if row.verdict == "converted"]


def test_symbolic_trace_works_wherever_it_works_on_the_original() -> None:
    assert _failed([row.name for row in _converted()], symbolically_traced) == {}


def test_torchscript_works_wherever_it_works_on_the_original() -> None:
    smallest: dict[tuple[str, str], Row] = {}
    for row in sorted(_converted(), key=lambda row: row.parameters):
        smallest.setdefault((row.name.partition("/")[0], row.family), row)
    assert _failed([row.name for row in smallest.values()], scripted) == {}
