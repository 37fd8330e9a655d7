"""Every name of both libraries, without data: no row of the walk may fail, none may differ from docs/zoo.csv, and
torch.fx.symbolic_trace takes each retrofitted network whose original it takes."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from tools.zoo import Entry, Row, entries, read_rows, walk
from tools.zoo.check import CONVERTED, FAILED, inspect_model
from tools.zoo.tables import summary_line

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.sweep


@dataclass
class TracedRow(Row):
    """A row that also says whether the retrofitted network was traced, and why not if the original is."""

    traced: bool = False
    trace_lost: str = ""


def check_and_trace(entry: Entry) -> Row:
    """What ``zoo.check`` does, and a symbolic trace of the network while it is retrofitted."""
    row = TracedRow(entry.name, entry.family, FAILED + "it was not checked")
    errors: list[Exception] = []

    def trace(retrofitted: nn.Module) -> None:
        try:
            torch.fx.symbolic_trace(copy.deepcopy(retrofitted).eval())  # a trace may leave proxies in attributes
            row.traced = True
        except Exception as error:
            errors.append(error)

    try:
        model = entry.build()
        row.parameters = sum(p.numel() for p in model.parameters())
        inspect_model(model, row, trace)
    except Exception as error:
        row.verdict = f"{FAILED}{type(error).__name__}: {error}"
        return row
    for error in errors:
        try:
            torch.fx.symbolic_trace(model.eval())
        except Exception:
            continue
        row.trace_lost = f"{type(error).__name__}: {str(error)[:300]}"
    return row


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Of one walk, though the two tests that look at it may run in two processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of this run, for all its processes
    file = folder / "walk.pickle"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            walked = list(walk(entries(), jobs=os.cpu_count() or 1, timeout=900, checker=check_and_trace))
            file.write_bytes(pickle.dumps(walked))
    found: list[Row] = pickle.loads(file.read_bytes())
    print(summary_line(found))
    return found


def test_every_name_is_converted_or_refused_for_a_reason(rows: list[Row]) -> None:
    assert {row.name: row.verdict for row in rows if row.verdict.startswith(FAILED)} == {}
    listed = {row.name: (row.verdict, row.kinds) for row in read_rows(ROOT / "docs" / "zoo.csv")}
    assert listed, "docs/zoo.csv is missing: python -m tools.zoo --output docs/zoo"
    found = {row.name: (row.verdict, row.kinds) for row in rows}
    # other versions of the libraries have names that the table lacks
    differing = {name: found[name] for name in found.keys() & listed.keys() if found[name] != listed[name]}
    assert differing == {}, "docs/zoo.csv is out of date: python -m tools.zoo --output docs/zoo --fresh"


def test_symbolic_trace_works_wherever_it_works_on_the_original(rows: list[Row]) -> None:
    converted = [row for row in rows if isinstance(row, TracedRow) and row.verdict == CONVERTED]
    assert sum(row.traced for row in converted) > len(converted) / 4
    assert {row.name: row.trace_lost for row in converted if row.trace_lost} == {}
