"""One network of each structure in docs/zoo.csv, without data: it must be converted or refused as it is listed, and
torch.fx.symbolic_trace and torch.jit.script take the retrofitted one of each family where they take the original.

``python -m tools.zoo`` walks all the names; docs/zoo.md says when that was done last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from zoo_rows import listed_rows, never_refused, smallest_of_each_family

from tools.zoo import Row, entries, smallest, structure
from tools.zoo.check import CONVERTED, FAILED, inspect_model

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.filterwarnings("ignore"),  # the libraries warn a great deal while they build networks
]


FAMILIES = {row.name: row.family for row in listed_rows()}


def task(name: str) -> tuple[str, str]:
    """A library's family of classifiers; of its networks for other tasks, whose families share most of their code, the task."""
    return name.partition("/")[0], FAMILIES[name].partition(".")[0]


# tracing and scripting take longer than all else
TRACED = {task(name): name for name in smallest_of_each_family()}.values()


def refusal(take: Callable[[nn.Module], object], model: nn.Module) -> Exception | None:
    """Why a tracer does not take a network; None if it does."""
    try:
        take(copy.deepcopy(model).eval())  # it may leave proxies in attributes, and more
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("listed", smallest(listed_rows(), structure), ids=lambda row: row.name)
def test_is_converted_or_refused_as_listed_and_traced_and_scripted_where_the_original_is(listed: Row) -> None:
    (entry,) = entries([listed.name])
    row = Row(entry.name, entry.family, FAILED + "it was not checked")
    takers = [torch.fx.symbolic_trace, torch.jit.script] if listed.name in TRACED else []
    refusals: list[Exception | None] = []
    model = entry.build()
    inspect_model(model, row, lambda retrofitted: refusals.extend(refusal(take, retrofitted) for take in takers))
    assert (row.verdict, row.kinds, row.extra) == (listed.verdict, listed.kinds, listed.extra), (
        "docs/zoo.csv is out of date: python -m tools.zoo --output docs/zoo --fresh"
    )
    assert len(refusals) == (len(takers) if row.verdict == CONVERTED else 0)
    for take, error in zip(takers, refusals, strict=False):
        if error is not None and (never_refused(row) or refusal(take, model) is None):
            raise AssertionError(f"{take.__name__} takes the original, and not the retrofitted network") from error
