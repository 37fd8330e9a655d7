"""A plan is carried out: on the same model, on another one that is built alike, and on no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from se_retrofit import Plan, RetrofitError, add_se, has_se, load_retrofitted, plan_of, plan_se, save_retrofitted


def test_a_plan_gives_the_network_that_its_options_give() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    plan = plan_se(model, reduction=4, bias=True, include="layer[24].*")
    by_plan, by_options = add_se(model, plan=plan), add_se(model, 4, bias=True, include="layer[24].*")
    assert plan_of(by_plan) == plan_of(by_options) == plan
    assert by_plan.state_dict().keys() == by_options.state_dict().keys()


def test_a_plan_comes_back_from_plain_data() -> None:
    model = timm.create_model("resnet10t")
    plan = plan_se(model, reduction=16, placement="3x3")
    assert plan_of(add_se(model, plan=Plan.from_dict(plan.to_dict()))) == plan


def test_the_inputs_of_a_plan_are_used_again() -> None:
    class Narrow(torch.nn.Module):
        """Takes one size only, which nothing tells."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(5, 8, 3, padding=1)
            self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.head = torch.nn.Linear(8 * 11 * 13, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head((x + self.norm(self.conv(x))).flatten(1))

    plan = plan_se(Narrow(), example_inputs=torch.zeros(1, 5, 11, 13))
    assert has_se(add_se(Narrow(), plan=plan))


def test_blocks_may_be_taken_out_of_a_plan_and_saving_keeps_that(tmp_path: Path) -> None:
    plan = plan_se(timm.create_model("resnet18"), exclude=["layer1.*", "layer2.0"])
    plan = replace(plan, sites=tuple(site for site in plan.sites if site.channels < 512))
    assert len(plan.sites) == 3
    model = add_se(timm.create_model("resnet18"), plan=plan)
    save_retrofitted(model, tmp_path / "saved")
    assert plan_of(model).sites == plan.sites
    assert [s.path for s in plan_of(load_retrofitted(tmp_path / "saved")).sites] == [s.path for s in plan.sites]


def test_a_plan_of_another_network_is_refused_and_the_model_is_as_it_was() -> None:
    plan = plan_se(timm.create_model("resnet18"))
    model = torchvision.models.resnet50()
    with pytest.raises(RetrofitError, match=r"no place for its site layer1\.0\.se_attention \(after bn2, 64 channels"):
        add_se(model, plan=plan, inplace=True)
    assert not has_se(model)


def test_options_beside_a_plan_are_refused() -> None:
    model = timm.create_model("resnet10t")
    plan = plan_se(model)
    with pytest.raises(RetrofitError, match=r"a plan brings its own options; give plan= alone"):
        add_se(model, 16, plan=plan)
    with pytest.raises(TypeError, match="plan must be what plan_se returns, got dict"):
        add_se(model, plan=plan.to_dict())  # type: ignore[arg-type]
