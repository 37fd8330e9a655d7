"""What goes wrong in the package itself is told as such, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import assert_untouched, snapshot
from timm.models.resnet import BasicBlock
from torch import nn

from se_retrofit import InsertSE, RetrofitError, add_se, plan_se, remove_se

X = torch.zeros(1, 3, 9, 9)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8)).eval()


def broken(error: BaseException) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "where", ["retrofit.planned", "surgery.splice.carry.built", "surgery.splice.carry.apply_edits", "retrofit.strip"]
)
def test_a_fault_asks_to_be_reported(monkeypatch: pytest.MonkeyPatch, where: str, inplace: bool) -> None:
    model, error = network(), TypeError("deep inside")
    call = partial(add_se, example_inputs=X)
    if where == "retrofit.strip":
        model, call = call(model), remove_se
    before = snapshot(model)
    monkeypatch.setattr(f"se_retrofit.{where}", broken(error))
    with pytest.raises(RetrofitError, match="please report") as raised:
        call(model, inplace=inplace)
    assert raised.value.__cause__ is error
    assert_untouched(model, before)


@pytest.mark.parametrize("call", [plan_se, InsertSE()])
def test_so_it_is_in_planning_and_in_the_pass(monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Any]) -> None:
    traced = torch.fx.symbolic_trace(network())
    monkeypatch.setattr("se_retrofit.retrofit.planned", broken(KeyError("block")))
    with pytest.raises(RetrofitError, match="please report"):
        call(traced)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        RetrofitError("with a reason"),
        torch.OutOfMemoryError(),
        UserWarning("a warning that the user has made an error"),
    ],
)
def test_interruptions_and_reasons_pass_as_they_are(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr("se_retrofit.surgery.splice.carry.apply_edits", broken(error))
    with pytest.raises(type(error)) as raised:
        add_se(network(), example_inputs=X)
    assert raised.value is error
