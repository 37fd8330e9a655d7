"""Every name of both libraries, without data: no row of the walk may fail, and none may differ from docs/zoo.csv."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from se_retrofit.zoo import entries, read_rows, walk
from se_retrofit.zoo.tables import summary_line

ROOT = Path(__file__).parents[2]


@pytest.mark.sweep
def test_every_name_is_converted_or_refused_for_a_reason() -> None:
    rows = list(walk(entries(), jobs=os.cpu_count() or 1, timeout=900))
    print(summary_line(rows))
    assert {row.name: row.verdict for row in rows if row.verdict.startswith("failed")} == {}
    listed = {row.name: (row.verdict, row.kinds) for row in read_rows(ROOT / "docs" / "zoo.csv")}
    assert listed, "docs/zoo.csv is missing: se-retrofit zoo --output docs/zoo"
    found = {row.name: (row.verdict, row.kinds) for row in rows}
    # other versions of the libraries have names that the table lacks
    differing = {name: found[name] for name in found.keys() & listed.keys() if found[name] != listed[name]}
    assert differing == {}, "docs/zoo.csv is out of date: se-retrofit zoo --output docs/zoo --fresh"
