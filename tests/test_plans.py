"""What a plan says is done, and what goes with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from se_retrofit import Plan, RetrofitError, add_se, has_se, load_retrofitted, plan_of, plan_se, save_retrofitted


def test_a_plan_gives_the_network_that_its_options_give() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    options = {"reduction": 4, "bias": True, "include": "layer[24].*", "placement": "3x3"}
    plan = plan_se(model, **options)
    by_plan, by_options = add_se(model, plan=Plan.from_dict(plan.to_dict())), add_se(model, **options)
    assert plan_of(by_plan) == plan_of(by_options) == plan
    assert by_plan.state_dict().keys() == by_options.state_dict().keys()


class Narrow(nn.Module):
    """Takes one size only, which nothing tells."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8 * 11 * 13, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.norm(self.conv(x))).flatten(1))


def test_the_inputs_of_a_plan_are_used_again() -> None:
    plan = plan_se(Narrow(), example_inputs=torch.zeros(1, 5, 11, 13))
    assert has_se(add_se(Narrow(), plan=plan))


def test_blocks_may_be_taken_out_of_a_plan_and_saving_keeps_that(tmp_path: Path) -> None:
    plan = plan_se(timm.create_model("resnet10t"), exclude="layer1.*")
    plan = replace(plan, sites=tuple(site for site in plan.sites if site.channels < 512))
    assert len(plan.sites) == 2
    model = add_se(timm.create_model("resnet10t"), plan=plan)
    save_retrofitted(model, tmp_path / "saved")
    assert plan_of(model).sites == plan.sites
    assert [s.path for s in plan_of(load_retrofitted(tmp_path / "saved")).sites] == [s.path for s in plan.sites]


def test_a_plan_of_another_network_is_refused_and_the_model_is_as_it_was() -> None:
    model = timm.create_model("test_resnet")
    with pytest.raises(RetrofitError, match=r"layer1\.0\.se_attention .*64 channels"):
        add_se(model, plan=plan_se(timm.create_model("resnet10t")), inplace=True)
    assert not has_se(model)


def test_options_beside_a_plan_are_refused() -> None:
    model = timm.create_model("resnet10t")
    plan = plan_se(model)
    with pytest.raises(RetrofitError, match="plan= alone"):
        add_se(model, 16, plan=plan)
    with pytest.raises(TypeError, match=r"plan must be .* got dict"):
        add_se(model, plan=plan.to_dict())  # type: ignore[arg-type]
