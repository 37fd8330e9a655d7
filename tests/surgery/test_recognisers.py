"""Recognisers of the user's own, and how the culprits of a wrong edit are found."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same_function, randomised
from structure import Unit, conv, module_of
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, plan_se
from se_retrofit.surgery import RECOGNISERS, Block, Recogniser, Record
from se_retrofit.surgery.record.runs import Runs


@module_of(lambda: {"value": conv(8, 8), "weight": conv(8, 8)})
def Gated(self, x: Tensor) -> Tensor:
    """The gated unit of PixelCNN (van den Oord et al., arXiv:1606.05328), which the package knows nothing of."""
    return torch.tanh(self.value(x)) * torch.sigmoid(self.weight(x))


@module_of(dict, Gated)
def Residual(self, x: Tensor) -> Tensor:
    return x + Gated.forward(self, x)


def network(*blocks: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 8, 1), *blocks)).eval()


def gated_units(record: Record) -> Iterator[Block]:
    for op in record.ops:
        if op.role == "mul" and {value.name for value in op.data} == {"tanh", "sigmoid"}:
            region = (op.ancestors | op.bit) & op.call.mask
            yield Block("gated", op.call, region, op, op)


def test_a_recogniser_of_the_users_own_finds_blocks() -> None:
    model = network(Gated(), Gated())
    assert {site.kind for site in plan_se(model).sites} == {"chain"}
    plan = plan_se(model, recognisers=[gated_units])
    assert [(site.path, site.kind) for site in plan.sites] == [("1.se_attention", "gated"), ("2.se_attention", "gated")]
    x = torch.randn(2, 3, 6, 6)
    assert_same_function(model, add_se(model, recognisers=[gated_units]), x)
    assert_same_function(model, add_se(model, plan=plan), x)


def test_one_file_and_one_row_are_all_that_a_kind_of_block_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worked example of CONTRIBUTING.md."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    file, row = re.findall(r"```python\n(.*?)```", text[text.index("## Add a kind of block") :], re.DOTALL)[:2]
    (tmp_path / "gated_units_of_a_stranger.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("gated_units_of_a_stranger")
    before = RECOGNISERS.copy()
    try:
        exec(row, {"RECOGNISERS": RECOGNISERS, "Recogniser": Recogniser, "gated_units": module.gated_units})
        model = network(Gated(), Gated())
        assert {site.kind for site in plan_se(model).sites} == {"gated"}
        assert_same_function(model, add_se(model), torch.randn(2, 3, 6, 6))
    finally:
        RECOGNISERS[:] = before


def test_it_is_asked_before_those_of_the_package() -> None:
    model = network(Residual())
    assert [site.kind for site in plan_se(model).sites] == ["residual"]
    assert [site.kind for site in plan_se(model, recognisers=[gated_units]).sites] == ["gated"]


def test_every_row_of_the_table_names_its_paper() -> None:
    for row in RECOGNISERS:
        assert "arXiv:" in (row.find.__doc__ or ""), row.find


@pytest.mark.parametrize(
    ("recognisers", "error", "fact"),
    [
        ("residual", TypeError, "recognisers"),
        ([3], TypeError, "recognisers"),
        (gated_units, TypeError, "recognisers"),
        ([lambda record: 1 / 0], RetrofitError, "ZeroDivisionError"),
        ([lambda record: None], RetrofitError, "TypeError"),
        ([lambda record: ["x"]], RetrofitError, "'x'"),
    ],
)
def test_what_is_no_list_of_functions_or_does_something_wrong_is_told_as_the_users(
    recognisers: Any, error: type[Exception], fact: str
) -> None:
    with pytest.raises(error, match=fact) as raised:
        plan_se(network(Gated()), recognisers=recognisers)
    assert "fault of se_retrofit" not in str(raised.value)


class Suspicious(Unit):
    """Does something else once its class is another."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if type(self) is Suspicious else x.mul(1.0)


def test_the_blocks_at_fault_alone_are_left_out_by_few_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Unit() for _ in range(12)]
    layers[7] = Suspicious()
    model = network(*layers)
    again, runs = Runs.again, []
    monkeypatch.setattr(Runs, "again", lambda self, *args, **kwargs: runs.append(1) or again(self, *args, **kwargs))
    plan = plan_se(model)
    assert len(plan.sites) == 11
    assert [skip.block for skip in plan.skipped] == ["8"]
    assert "does something else" in plan.skipped[0].reason
    assert len(runs) <= 10
    assert_same_function(model, add_se(model, plan=plan), torch.randn(2, 3, 6, 6))
