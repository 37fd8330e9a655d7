"""One network of each structure in docs/zoo.csv, without data: it must be converted or refused as it is listed.

The smallest of each family is in test_families.py. ``python -m tools.zoo`` walks all the names; docs/zoo.md says when that was
done last.
"""

from __future__ import annotations

import pytest
from zoo_rows import OUT_OF_DATE, listed_rows, smallest_of_each_family

from tools.zoo import Row, check, entries, smallest, structure

FAMILIES = {row.name for row in smallest_of_each_family()}


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # the libraries warn a great deal while they build networks
@pytest.mark.parametrize(
    "listed", [row for row in smallest(listed_rows(), structure) if row.name not in FAMILIES], ids=lambda row: row.name
)
def test_is_converted_or_refused_as_listed(listed: Row) -> None:
    row = check(*entries([listed.name]))
    assert (row.verdict, row.kinds, row.extra) == (listed.verdict, listed.kinds, listed.extra), OUT_OF_DATE
