"""What version 0.2.0 saved when a static factor was a gate of SE is read as it is now, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from older_network import older_network
from safetensors.torch import load_file

from se_retrofit import Plan, add_se, load_retrofitted, load_se, plan_of, save_retrofitted
from se_retrofit.attention import SEAttention, StaticFactor

OLDER = Path(__file__).with_name("older")
SAVED = load_file(OLDER / "outputs.safetensors")


def test_static_gates_are_the_attention_static(tmp_path: Path) -> None:
    model = load_retrofitted(OLDER / "static", base=older_network())
    assert torch.equal(model(SAVED["x"]), SAVED["static"])
    assert plan_of(model).options["attention"] == "static"
    assert plan_of(model).options["gate"] == "identity"
    assert [type(model[i].se_attention) for i in (1, 2)] == [StaticFactor] * 2
    assert torch.equal(load_se(older_network(), OLDER / "static.safetensors")(SAVED["x"]), SAVED["static"])
    again = load_retrofitted(save_retrofitted(model, tmp_path / "again"), base=older_network())
    assert torch.equal(again(SAVED["x"]), SAVED["static"])


def test_a_factor_that_a_fold_left_beside_se() -> None:
    model = load_retrofitted(OLDER / "factor", base=older_network())
    assert torch.equal(model(SAVED["x"]), SAVED["factor"])
    assert [type(model[i].se_attention) for i in (1, 2)] == [StaticFactor, SEAttention]
    assert [site.attention for site in plan_of(model).sites] == ["static", "se"]


def test_a_saved_plan_is_carried_out() -> None:
    recipe = json.loads((OLDER / "static" / "recipe.json").read_text())
    plan = Plan.from_dict({**recipe["plan"], "options": recipe["add_se"]})
    assert all(type(module) is StaticFactor for _, module in _inserted(add_se(older_network(), plan=plan)))


def _inserted(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if path.endswith("se_attention")]
