"""All that runs a retrofitted network again takes it as it is: cast to another dtype, or with methods that return nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import narrow_resnet, randomised, run, same_tensors, se_modules
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from se_retrofit import (
    add_se,
    export,
    fold_se,
    from_native,
    fuse_se,
    inspect_se,
    load_retrofitted,
    plan_of,
    remove_se,
    save_retrofitted,
    to_native,
)
from se_retrofit.inspection import excitations
from se_retrofit.saving import load_se, save_se
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
    assert agreement(remove_se(model), model, (x,), training=True).equal

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


def test_a_plan_that_does_not_tell_the_dtype_of_its_model_follows_the_model() -> None:
    model = add_se(narrow_resnet(), 2, example_inputs=torch.zeros(1, 3, 32, 32)).double()
    older = json.loads(plan_of(model).to_json())
    del older["inputs"]["dtype"]
    twin = add_se(remove_se(model), plan=type(plan_of(model)).from_dict(older))
    assert list(se_modules(twin)) == list(se_modules(model))
