"""``at``: SE on what the modules return that a user names."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from networks import assert_same_function, randomised, se_modules
from structure import conv, module_of, unit
from torch import Tensor, nn

from se_retrofit import Plan, RetrofitError, add_se, plan_se, remove_se


def step(inputs: int, outputs: int) -> nn.Module:
    act = nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(conv1=conv(inputs, outputs), act=act, conv2=conv(outputs, outputs), act2=act))


def parts() -> dict[str, nn.Module]:
    block = step(8, 8)
    decoder = nn.ModuleList([step(8, 8), step(8, 12)])
    rest = {"pair": nn.LSTM(12, 4, batch_first=True), "unused": nn.Conv2d(1, 1, 1), "same": nn.Identity()}
    return {"stem": unit(3, 8), "block": block, "decoder": decoder, **rest, "alias": block}


@module_of(parts)
def Net(self, x: Tensor) -> Tensor:
    """An encoder of residual blocks and a decoder of plain steps, one of which runs twice; and a module that never runs."""
    x = self.same(self.stem(x))
    x = x + self.block(x)
    x = self.decoder[1](self.decoder[0](self.decoder[0](x)))
    return self.pair(x.flatten(2).transpose(1, 2))[0]


def net() -> nn.Module:
    return randomised(Net()).eval()


def sites(plan: Plan) -> list[tuple[str, str, int]]:
    return [(site.block, site.kind, site.channels) for site in plan.sites]


X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("decoder.*.conv2", [("decoder.0.conv2", "named", 8), ("decoder.1.conv2", "named", 12)]),
        ("stem", [("stem", "named", 8)]),
        ("alias", [("block", "named", 8)]),
        ("stem.1", [("stem.1", "named", 8)]),
        (["block", "decoder.1"], [("block", "named", 8), ("decoder.1", "named", 12)]),
    ],
)
def test_se_goes_on_what_the_named_modules_return_and_nowhere_else(at: str | list[str], expected: list[object]) -> None:
    model = net()
    assert sites(plan_se(model, example_inputs=X, at=at)) == expected
    retrofitted = add_se(model, example_inputs=X, at=at)
    assert len(se_modules(retrofitted)) == len(expected)
    assert_same_function(model, retrofitted, X)
    assert list(remove_se(retrofitted).state_dict()) == list(model.state_dict())


def test_se_scales_the_named_modules_output_itself() -> None:
    model = net()
    retrofitted = add_se(model, example_inputs=X, at="decoder.0.conv1")
    (se,) = se_modules(retrofitted).values()
    given: list[Tensor] = []
    se.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    made: list[Tensor] = []
    model.decoder[0].conv1.register_forward_hook(lambda module, args, output: made.append(output.clone()))
    model(X), retrofitted(X)
    assert len(given) == len(made) == 2  # the module runs twice, with one SE
    assert all(map(torch.equal, given, made))


def test_beside_the_blocks_found_and_once_where_both_are_the_same() -> None:
    model = net()
    auto = plan_se(model, example_inputs=X)
    assert [site.kind for site in auto.sites] == ["residual"]
    both = plan_se(model, example_inputs=X, at=["stem", "block"], auto=True)
    assert [site.block for site in both.sites] == ["stem", "block"]
    assert both.sites[1].kind == "named"
    assert plan_se(model, example_inputs=X, at="stem", auto=True, exclude="block").sites[0].block == "stem"


def test_a_plan_with_named_places_is_carried_out_from_its_json() -> None:
    model = net()
    plan = Plan.from_json(plan_se(model, example_inputs=X, at="decoder.*", auto=True).to_json())
    assert_same_function(model, add_se(model, plan=plan), X)
    assert plan.options["at"] == ["decoder.*"]


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"at": "encoder.*"}, RetrofitError, r"'encoder\.\*'"),
        ({"at": "unused"}, RetrofitError, "'unused'.* not called"),
        ({"at": "same"}, RetrofitError, "'same'.* input as it is"),
        ({"at": "stem", "exclude": "block"}, RetrofitError, "with at alone"),
        ({"at": "stem", "placement": "pre"}, RetrofitError, "auto=True"),
        ({"at": []}, RetrofitError, "at is empty"),
        ({"include": []}, RetrofitError, "include is empty"),
        ({"auto": False}, RetrofitError, "auto=False"),
        ({"at": 3}, TypeError, "at must be"),
    ],
)
def test_what_cannot_be_had_is_said(options: dict[str, Any], error: type[Exception], fact: str) -> None:
    with pytest.raises(error, match=fact):
        plan_se(net(), example_inputs=X, **options)


def test_what_a_pattern_matches_without_a_place_is_listed() -> None:
    skipped = {skip.block: skip.reason for skip in plan_se(net(), example_inputs=X, at="[su]*").skipped}
    assert skipped.keys() == {"unused", "same"}
    assert "not called" in skipped["unused"]
    assert "input as it is" in skipped["same"]
