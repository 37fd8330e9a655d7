"""SE that is gone with the module that held it, which somebody replaced after the retrofit, is told."""

from __future__ import annotations

import copy
import pickle
import warnings
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


def replace_relus(model: nn.Module, count: int) -> nn.Module:
    features = model[0]
    places = [i for i, module in enumerate(features) if isinstance(module, nn.ReLU)]
    for i in places[:count]:
        features[i] = nn.GELU()
    return model


def test_a_part_of_the_sites_is_named_wherever_the_model_is_looked_at(tmp_path: Path) -> None:
    model = replace_relus(add_se(vgg()), 2)
    message = r"2 SE modules .*0\.1\.se_attention, 0\.4\.se_attention"
    with pytest.warns(UserWarning, match=message):
        assert has_se(model)
    with pytest.warns(UserWarning, match=message):
        assert len(inspect_se(model).report().rows) == 6
    with pytest.warns(UserWarning, match=message):
        save_retrofitted(model, tmp_path / "saved")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.ModuleDict({"backbone": model})):
        with pytest.warns(UserWarning, match="2 SE modules"):
            assert has_se(twin)
    assert len(plan_of(model).sites) == 6


def test_all_sites_gone_is_told_too(tmp_path: Path) -> None:
    model = replace_relus(add_se(vgg()), 8)
    with pytest.warns(UserWarning, match="8 SE modules"):
        assert not has_se(model)
    with pytest.warns(UserWarning, match="8 SE modules"), pytest.raises(RetrofitError, match="no SE modules"):
        save_retrofitted(model, tmp_path / "saved")


def test_nothing_is_said_of_a_whole_or_a_bare_model() -> None:
    model = add_se(vgg())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_se(model)
        assert len(inspect_se(model).report().rows) == 8 == len(se_modules(model))
        assert not has_se(remove_se(model))
    assert vars(remove_se(model)).keys() == vars(vgg()).keys()
