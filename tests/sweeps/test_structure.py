"""torch.jit.script takes the retrofitted network wherever it takes the original: the smallest of each family."""

from __future__ import annotations

import copy
from collections.abc import Hashable

import pytest
import torch
from torch import nn
from zoo_rows import listed_rows, never_refused

from se_retrofit import add_se
from tools.zoo import Row, entries, smallest
from tools.zoo.check import CONVERTED

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]

CONVERTED_ROWS = [row for row in listed_rows() if row.verdict == CONVERTED]


def family(row: Row) -> Hashable:
    return row.name.partition("/")[0], row.family


def script_error(model: nn.Module) -> Exception | None:
    try:
        torch.jit.script(model)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("row", smallest(CONVERTED_ROWS, family), ids=lambda row: row.name)
def test_torchscript_works_wherever_it_works_on_the_original(row: Row) -> None:
    (entry,) = entries([row.name])
    model = entry.build().eval()
    error = script_error(add_se(copy.deepcopy(model), inplace=True))  # scripting may leave something behind
    if error is not None and (never_refused(row) or script_error(model) is None):
        raise AssertionError("TorchScript takes the original, and not the retrofitted network") from error
