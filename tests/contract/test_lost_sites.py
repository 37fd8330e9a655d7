"""SE that is gone with the module that held it, which somebody replaced after the retrofit, is told."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from networks import se_modules
from torch import nn
from torchvision.models.vgg import make_layers

from se_retrofit import RetrofitError, add_se, has_se, inspect_se, plan_of, remove_se, save_retrofitted


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
    with pytest.warns(UserWarning, match="8 SE modules"), pytest.raises(RetrofitError, match="no SE modules"):
        save_retrofitted(model, tmp_path / "saved")


def test_nothing_is_said_of_a_whole_or_a_bare_model() -> None:
    model = add_se(vgg())
    assert has_se(model)  # a warning would be an error
    assert len(inspect_se(model).report().rows) == 8 == len(se_modules(model))
    assert not has_se(remove_se(model))
    assert vars(remove_se(model)).keys() == vars(vgg()).keys()
