"""All that runs a retrofitted network again takes it as it is: cast to another dtype, or with methods that return nothing."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from networks import narrow_resnet, randomise_se, randomised, run, same_tensors, se_modules
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from se_retrofit import (
    RetrofitError,
    add_se,
    export,
    fold_se,
    from_native,
    fuse_se,
    has_se,
    inspect_se,
    load_retrofitted,
    plan_of,
    remove_se,
    save_retrofitted,
    to_native,
)
from se_retrofit.attention import GATES
from se_retrofit.inspection import excitations
from se_retrofit.saving import load_se, save_se
from se_retrofit.surgery.record.inputs import Inputs
from se_retrofit.verify import agreement

NATIVE = {"block_args": {"attn_layer": partial(SEModule, rd_ratio=0.5, rd_divisor=4)}}


class Quiet:
    """``train``, and with it ``eval``, returns nothing, as OpenMMLab's; nor does ``to``."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> None:
        super().to(*args, **kwargs)  # type: ignore[misc]


class QuietBlock(Quiet, BasicBlock):
    pass


class QuietNet(Quiet, ResNet):
    pass


def quiet(**options: Any) -> nn.Module:
    net = QuietNet(QuietBlock, [1, 1, 1, 1], num_classes=10, channels=(8, 8, 16, 16), **options)
    net.eval()
    return randomised(net)


# the base, the dtype to which the retrofitted network is cast, and that of the native one
KINDS = {
    "float64": (narrow_resnet, torch.float64, torch.float32),
    "float16": (narrow_resnet, torch.float16, torch.float64),
    "quiet": (quiet, torch.float32, torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_everywhere(kind: str, tmp_path: Path) -> None:
    base, dtype, other = KINDS[kind]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = add_se(base(), 2, bias=True, example_inputs=x.float())
    model.to(dtype)
    (y,) = run(model, x)
    assert agreement(remove_se(model), model, Inputs((x,)), training=True).equal

    found = inspect_se(model)
    assert found.report().inputs == "3x32x32"
    assert "se_attention" in str(found.block("layer1.0"))
    assert found.write_html(tmp_path / "page.html").exists()
    assert len(excitations(model, [x]).sites) == 4
    assert export(model, tmp_path / "net.py").exists()

    fused = fuse_se(model)
    assert not fused.training
    assert run(fused, x)[0].dtype == x.dtype
    folded = fold_se(model, [x], tolerance=1e9)
    assert len(folded.fold_report.folded) == 4
    assert run(folded, x)[0].dtype == x.dtype

    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=base())
    part = load_se(remove_se(model), save_se(model, tmp_path / "se.safetensors"))
    carried_out = add_se(remove_se(model), plan=plan_of(model))
    assert plan_of(carried_out).sites == plan_of(model).sites
    for twin in (again, part, carried_out):
        assert same_tensors(run(twin, x), [y])

    native = base(**NATIVE)
    native.to(other)
    filled = to_native(model, native)
    torch.testing.assert_close(filled(x.to(other)), y.to(other), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(from_native(model, filled)(x), y, rtol=1e-3, atol=1e-3)
    assert {p.dtype for p in to_native(model).parameters()} == {x.dtype}


def test_a_network_that_was_cast_first_is_loaded_into_a_base_that_was_not(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32).double()
    model = add_se(narrow_resnet().double(), example_inputs=x)
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=narrow_resnet())
    assert same_tensors(run(again, x), run(model, x))


class Mixed(nn.Module):
    """Takes float32 though its first parameter is of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x + self.conv2(x.relu()) * self.scale.to(x.dtype)


def test_inputs_that_differ_from_the_first_parameter_stay_as_they_were_given() -> None:
    model = add_se(Mixed(), 2, example_inputs=torch.zeros(1, 3, 8, 8))
    assert inspect_se(model).report().inputs == "3x8x8"
    assert inspect_se(model, torch.zeros(1, 3, 9, 9)).report().inputs == "3x9x9"


# No images: a detector's head on no proposals; compiled and exported: tests/attention/test_citizens.py --------


class LastUnit(nn.Module):
    """Channels last, with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) + self.norm(self.conv(x).permute(0, 2, 3, 1))


class Detector(nn.Module):
    """Features of the image, and what the head says of the proposals in it, as in Mask R-CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, stride=2)
        self.head = nn.Sequential(nn.Conv2d(4, 8, 1), BasicBlock(8, 8), LastUnit(), nn.Flatten(), nn.Linear(8 * 25, 3))

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        return self.head(torchvision.ops.roi_align(self.backbone(image), [boxes], 5))


BOXES = torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 2.0, 20.0, 12.0]])


@pytest.mark.parametrize("gate", GATES)
def test_a_detectors_head_goes_on_without_proposals_also_fused_folded_and_in_native_form(gate: str) -> None:
    inputs = torch.randn(1, 3, 32, 32), BOXES
    model = randomise_se(add_se(randomised(Detector()).eval(), gate=gate, example_inputs=inputs))
    assert [se.channel_dim for se in se_modules(model).values()] == [-3, -1]
    folded = copy.deepcopy(model)
    folded.head = fold_se(model.head, [torch.randn(2, 4, 5, 5)], tolerance=1e9)
    forms = [model, fuse_se(model), folded, *([to_native(model)] if gate == "sigmoid" else [])]
    for form, training, grad in itertools.product(forms, (False, True), (False, True)):
        with torch.set_grad_enabled(grad):
            assert form.train(training)(inputs[0], BOXES[:0]).shape == (0, 3)
            assert form(*inputs).isfinite().all()


# SE that is gone with the module that held it, which somebody replaced after the retrofit ---------------------------


def vgg() -> nn.Module:
    """VGG-11, but narrow; SE sits in its ReLUs."""
    features = make_layers([8, "M", 8, "M", 8, 8, "M", 8, 8, "M", 8, 8, "M"])
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def replaced(count: int) -> nn.Module:
    """Retrofitted, and then some of its ReLUs are replaced."""
    model = add_se(vgg())
    for i in [i for i, module in enumerate(model[0]) if isinstance(module, nn.ReLU)][:count]:
        model[0][i] = nn.GELU()
    return model


@pytest.mark.parametrize(
    "look",
    [
        has_se,
        lambda model: len(inspect_se(model).report().rows) == 6,
        lambda model: has_se(copy.deepcopy(model)),
        lambda model: has_se(pickle.loads(pickle.dumps(model))),
        lambda model: has_se(nn.ModuleDict({"backbone": model})),
    ],
    ids=["asked", "inspected", "copied", "pickled", "in another"],
)
def test_a_part_of_the_sites_is_named_wherever_the_model_is_looked_at(look: Callable[[nn.Module], bool]) -> None:
    model = replaced(2)
    with pytest.warns(UserWarning, match=r"2 SE modules .*0\.1\.se_attention, .*0\.4\.se_attention"):
        assert look(model)
    assert len(plan_of(model).sites) == 6


def test_all_sites_gone_is_told_too_and_not_saved(tmp_path: Path) -> None:
    model = replaced(8)
    with pytest.warns(UserWarning, match="8 SE modules"):
        assert not has_se(model)
    with (
        pytest.warns(UserWarning, match="8 SE modules"),
        pytest.raises(RetrofitError, match="no SE inserted by add_se"),
    ):
        save_retrofitted(model, tmp_path / "saved")


def test_nothing_is_said_of_a_whole_or_a_bare_model() -> None:
    model = add_se(vgg())
    assert has_se(model)  # a warning would be an error
    assert len(inspect_se(model).report().rows) == 8 == len(se_modules(model))
    assert not has_se(remove_se(model))
    assert vars(remove_se(model)).keys() == vars(vgg()).keys()
