"""The report says what was put where and what it costs, and its figures agree with those of others."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from inspected import NETWORKS, example, inspected, small_resnet
from networks import se_modules
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from se_retrofit import add_se, inspect_se


def counted(model: nn.Module) -> int:
    """Multiply-adds for one image, by torch's counter on an ordinary call of the model."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(example()[:1])
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["bottleneck", "inverted", "dense", "branches", "scaled", "functions"])
def test_counts_agree_with_torchs(name: str) -> None:
    bare, model, found = NETWORKS[name](), inspected(name).model, inspected(name).report()
    assert found.parameters_before == sum(p.numel() for p in bare.parameters())
    assert found.parameters_after == sum(p.numel() for p in model.parameters())
    assert found.parameters_after - found.parameters_before == sum(row.parameters for row in found.rows)
    assert found.multiply_adds_before == counted(bare)
    assert found.multiply_adds_after == counted(model)
    assert sum(row.excitation or 0 for row in found.rows) == sum(
        2 * se.channel * se.hidden for se in se_modules(model).values()
    )


@pytest.mark.parametrize(
    ("name", "before", "after"),
    # GFLOPs at 224x224, r = 16, of table 2 of the SE paper
    [("resnet50", 3.86, 3.87), pytest.param("resnet101", 7.58, 7.60, marks=pytest.mark.sweep), ("vgg16", 15.47, 15.48)],
)
def test_counts_agree_with_the_papers(name: str, before: float, after: float) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    if name.startswith("resnet"):  # the paper's networks have the stride in the first conv; torchvision's in the second
        for stage in (model.layer2, model.layer3, model.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    found = inspect_se(add_se(model, 16, inplace=True)).report()
    assert found.multiply_adds_before is not None
    assert found.multiply_adds_after is not None
    # ResNet-101's is 7.57 here: the paper counts some things that torch's counter does not
    assert found.multiply_adds_before / 1e9 == pytest.approx(before, abs=0.0105)
    assert (found.multiply_adds_after + found.squeeze_scale) / 1e9 == pytest.approx(after, abs=0.017)
    if name == "resnet50":
        assert round(found.parameters_after / 1e6, 1) == 28.1  # as the paper says
    assert found.squeeze_scale == sum(row.channels * row.shape[1] * row.shape[2] for row in found.rows)


class Resizing(nn.Sequential):
    """Brings its images to one size first, as detectors do."""

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        sized = [nn.functional.interpolate(image[None], size=(64, 96)) for image in images]
        return super().forward(torch.cat(sized))


def test_the_inputs_given_are_those_that_are_counted_and_what_they_are_resized_to_is_said() -> None:
    model = add_se(small_resnet())
    found = inspect_se(model, torch.empty(3, 3, 64, 96)).report()
    assert (found.inputs, found.rows[0].shape, found.resized) == ("3x64x96", (64, 16, 24), None)
    inputs = ([torch.empty(3, 40, 40), torch.empty(3, 50, 40)],)
    sized = inspect_se(add_se(Resizing(small_resnet()), example_inputs=inputs), inputs).report()
    assert (sized.inputs, sized.resized) == ("3x40x40", "3x64x96")
    assert "for one 3x40x40 input, resized to 3x64x96 by the network" in str(sized)
    assert sized.multiply_adds_after == found.multiply_adds_after  # for one input, however many there are
    assert "resized" not in str(found)


def test_trainable_parameters_are_counted_before_and_after() -> None:
    model = small_resnet().requires_grad_(False)
    model.fc.requires_grad_(True)
    found = inspect_se(add_se(model)).report()
    assert found.trainable_before == sum(p.numel() for p in model.fc.parameters())
    assert found.trainable_after == found.trainable_before + found.parameters_after - found.parameters_before
    assert f"({100 * found.trainable_after / found.parameters_after:.2f}% of all)" in str(found)


def test_a_module_called_twice_costs_twice() -> None:
    (row,) = inspected("twice").report().rows
    assert row.excitation == 2 * 2 * row.channels * 4
    assert row.squeeze_scale == 2 * row.channels * 64 * 64


@pytest.mark.sweep
def test_a_network_that_needs_values_is_counted_on_a_copy_that_has_them() -> None:
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    found = inspect_se(add_se(model)).report()
    assert found.multiply_adds_before is not None
    assert found.multiply_adds_after is not None
    assert found.multiply_adds_after > found.multiply_adds_before > 1e9
    assert all(row.multiply_adds for row in found.rows)


def test_json_holds_all_of_it_and_left_out_blocks_are_listed_with_reasons() -> None:
    found = inspected("residual")
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [row["path"] for row in data["rows"]] == [site.path for site in found.plan.sites]
    assert data["rows"][0]["shape"] == [64, 16, 16]
    assert data["parameters_after"] - data["parameters_before"] == found.plan.parameters
    assert data["options"]["reduction"] == 16
    assert [skip["block"] for skip in data["skipped"]] == [skip.block for skip in found.plan.skipped]
    assert "layer4.0: excluded" in str(found)
