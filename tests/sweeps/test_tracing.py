"""One network of each structure in docs/zoo.csv, without data: it must be converted or refused as it is listed, and
torch.fx.symbolic_trace takes the retrofitted network where it takes the original.

``python -m tools.zoo`` walks all the names; docs/zoo.md says when that was done last.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo_rows import listed_rows, never_refused

from tools.zoo import Row, entries, smallest, structure
from tools.zoo.check import CONVERTED, FAILED, inspect_model

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.filterwarnings("ignore"),  # the libraries warn a great deal while they build networks
]


def trace_error(model: nn.Module) -> Exception | None:
    try:
        torch.fx.symbolic_trace(model)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("listed", smallest(listed_rows(), structure), ids=lambda row: row.name)
def test_is_converted_or_refused_as_listed_and_traced_where_the_original_is(listed: Row) -> None:
    (entry,) = entries([listed.name])
    row = Row(entry.name, entry.family, FAILED + "it was not checked")
    errors: list[Exception | None] = []

    def trace(retrofitted: nn.Module) -> None:
        errors.append(trace_error(copy.deepcopy(retrofitted).eval()))  # a trace may leave proxies in attributes

    model = entry.build()
    inspect_model(model, row, trace)
    assert (row.verdict, row.kinds) == (listed.verdict, listed.kinds), (
        "docs/zoo.csv is out of date: python -m tools.zoo --output docs/zoo --fresh"
    )
    assert len(errors) == (row.verdict == CONVERTED)
    for error in errors:
        if error is not None and (never_refused(row) or trace_error(model.eval()) is None):
            raise AssertionError("the original is traced, and the retrofitted network is not") from error
