"""What earlier versions saved is loaded as it was: the same weights, the same SE modules, the same outputs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from networks import se_modules
from safetensors.torch import load_file
from saved_before import FOLDERS, SAVED, outputs

from se_retrofit import load_retrofitted, plan_of
from se_retrofit.attention import SEAttention, StaticFactor
from se_retrofit.saving import load_se


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_of_an_earlier_version_loads(name: str) -> None:
    saved = SAVED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about it is wrong, so nothing is said
        model = load_retrofitted(FOLDERS / name, base=None if saved.base else saved.make())
    recipe = json.loads((FOLDERS / name / "recipe.json").read_text())
    assert [site.path for site in plan_of(model).sites] == [site["path"] for site in recipe["plan"]["sites"]]
    weights, state = load_file(FOLDERS / name / "weights.safetensors"), model.state_dict()
    weights.update({alias: weights[kept] for alias, kept in recipe["tied"].items()})
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in weights.items())
    expected = load_file(FOLDERS / f"{name}.outputs.safetensors")["outputs"]
    torch.testing.assert_close(outputs(model, saved), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SAVED)
def test_se_modules_of_an_earlier_version_load(name: str) -> None:
    model = load_se(SAVED[name].make(), FOLDERS / f"{name}.se.safetensors")
    loaded = {f"{path}.{key}": v for path, se in se_modules(model).items() for key, v in se.state_dict().items()}
    saved = load_file(FOLDERS / f"{name}.se.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], value) for key, value in saved.items())


@pytest.mark.parametrize(("name", "classes"), [("static", {StaticFactor}), ("factors", {StaticFactor, SEAttention})])
def test_a_static_factor_that_was_a_gate_of_se_is_an_attention_of_its_own(name: str, classes: set[type]) -> None:
    model = load_retrofitted(FOLDERS / name, base=SAVED[name].make())
    assert {type(module) for module in se_modules(model).values()} == classes
    assert {site.attention for site in plan_of(model).sites} == {
        {StaticFactor: "static", SEAttention: "se"}[c] for c in classes
    }
