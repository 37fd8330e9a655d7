"""What earlier versions saved is loaded as it was, and so is what this one saves: the same weights, SE modules and outputs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from networks import se_modules
from recipes import assert_same_state, recipe_of
from safetensors.torch import load_file
from saved_before import FOLDERS, SAVED, outputs
from torch import Tensor, nn

from se_retrofit import has_se, load_retrofitted, plan_of, save_retrofitted
from se_retrofit.attention import SEAttention, StaticFactor
from se_retrofit.saving import load_se, save_se

CLASSES = {"se": SEAttention, "static": StaticFactor}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def se_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{key}": v for path, se in se_modules(model).items() for key, v in se.state_dict().items()}


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_of_an_earlier_version_loads(name: str) -> None:
    saved = SAVED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about it is wrong, so nothing is said
        model = load_retrofitted(FOLDERS / name, base=None if saved.base else saved.make())
    recipe = recipe_of(FOLDERS / name)
    assert [site.path for site in plan_of(model).sites] == [site["path"] for site in recipe["plan"]["sites"]]
    # a static factor was a gate of SE once, and is an attention of its own now
    assert {site.attention for site in plan_of(model).sites} == saved.attentions
    assert {type(module) for module in se_modules(model).values()} == {CLASSES[name] for name in saved.attentions}
    weights = load_file(FOLDERS / name / "weights.safetensors")
    weights.update({alias: weights[kept] for alias, kept in recipe["tied"].items()})
    assert same(model.state_dict(), weights)
    expected = load_file(FOLDERS / f"{name}.outputs.safetensors")["outputs"]
    torch.testing.assert_close(outputs(model, saved), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SAVED)
def test_se_modules_of_an_earlier_version_load(name: str) -> None:
    model = load_se(SAVED[name].make().to(SAVED[name].dtype), FOLDERS / f"{name}.se.safetensors")
    assert same(se_state(model), load_file(FOLDERS / f"{name}.se.safetensors"))


@pytest.mark.parametrize("name", SAVED)
def test_what_this_version_saves_comes_back_the_same_each_time(name: str, tmp_path: Path) -> None:
    saved = SAVED[name]
    again = model = saved.network()
    assert saved.left is None or set(saved.left) <= set(se_modules(model))
    for folder in ("once", "twice"):  # what was loaded tells as much as what was saved
        save_retrofitted(again, tmp_path / folder, base=saved.base)
        again = load_retrofitted(tmp_path / folder, base=None if saved.base else saved.make())
    assert plan_of(again) == plan_of(model)
    assert_same_state(again, model)
    file, base = save_se(model, tmp_path / "se.safetensors"), saved.make().to(saved.dtype)
    assert same(load_file(file), se_state(model))
    assert same(se_state(load_se(base, file)), se_state(model))
    assert not has_se(base)
    assert torch.equal(outputs(again, saved), outputs(model, saved))
