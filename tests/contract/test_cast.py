"""A retrofitted network that was cast to another dtype is worked on as it is by everything that runs it again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomised, run, same_tensors, se_modules
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from se_retrofit import (
    add_se,
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
from se_retrofit.exporting import export
from se_retrofit.saving import load_se, save_se

DTYPES = [torch.float64, torch.float16]


def bare(**options: Any) -> nn.Module:
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, channels=(8, 8, 16, 16), **options)
    return randomised(net).eval()


def images(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


def cast(dtype: torch.dtype, **options: Any) -> nn.Module:
    return add_se(bare(), 2, example_inputs=images(torch.float32), **options).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_inspected_drawn_exported_and_fused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = cast(dtype)
    found = inspect_se(model)
    assert found.report().inputs == "3x32x32"
    assert "se_attention" in str(found.block("layer1.0"))
    assert found.write_html(tmp_path / "page.html").exists()
    assert export(model, tmp_path / "net.py").exists()
    assert run(fuse_se(model), images(dtype))[0].dtype == dtype


@pytest.mark.parametrize("other", [torch.float32, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_native_form_may_be_of_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    model = cast(dtype, bias=True)
    assert {p.dtype for p in to_native(model).parameters()} == {dtype}
    target = bare(block_args={"attn_layer": partial(SEModule, rd_ratio=0.5, rd_divisor=4)}).to(other)
    filled = to_native(model, target)
    coarser = torch.float16 if torch.float16 in (dtype, other) else torch.float32
    x, (one,) = images(other), run(model, images(dtype))
    torch.testing.assert_close(filled(x).to(coarser), one.to(coarser), rtol=0.1, atol=0.1)
    (back,) = run(from_native(model, target), images(dtype))
    torch.testing.assert_close(back.to(coarser), target(x).to(coarser), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_saved_and_loaded_and_its_plan_is_carried_out_again(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = cast(dtype), images(dtype)
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=bare())
    assert same_tensors(run(again, x), run(model, x))
    assert list(se_modules(load_se(bare().to(dtype), save_se(model, tmp_path / "se.safetensors")))) == list(
        se_modules(model)
    )
    twin = add_se(remove_se(model), plan=plan_of(model))
    assert plan_of(twin).sites == plan_of(model).sites
    assert same_tensors(run(twin, x), run(model, x))


def test_a_network_that_was_cast_first_is_loaded_into_a_base_that_was_not(tmp_path: Path) -> None:
    model = add_se(bare().double(), example_inputs=images(torch.float64))
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=bare())
    assert same_tensors(run(again, images(torch.float64)), run(model, images(torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_folded(dtype: torch.dtype) -> None:
    folded = fold_se(cast(dtype), [images(dtype)], tolerance=1e9)
    report = folded.fold_report
    assert len(report.folded) == 4
    assert run(folded, images(dtype))[0].dtype == dtype


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
    model = cast(torch.float64)
    older = json.loads(json.dumps(plan_of(model).to_dict()))
    del older["inputs"]["dtype"]
    twin = add_se(remove_se(model), plan=type(plan_of(model)).from_dict(older))
    assert list(se_modules(twin)) == list(se_modules(model))
