"""A plan is carried out as it is: without a recording, wherever its edits fit; and where they don't, it is made again and compared."""

from __future__ import annotations

import copy
import importlib
import json
import linecache
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_untouched, randomise_se, randomised, run, same_tensors, se_modules, snapshot
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.feature_extraction import create_feature_extractor

import se_retrofit.surgery.record.runs
from se_retrofit import (
    Plan,
    RetrofitError,
    add_se,
    has_se,
    load_retrofitted,
    plan_of,
    plan_se,
    remove_se,
    save_retrofitted,
)


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        if relu:
            return torch.relu(self.branch(x) + x)
        out = self.branch(x)
        out += x
        return out


class Derived(Unit):
    """Its branch is a method of its base class."""

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x)


class Twice(nn.Module):
    """A unit that is called in two ways and stands under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.derived = nn.Conv2d(3, 4, 3), Unit(), Derived()
        self.alias = self.unit

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.derived(self.unit(self.stem(x))), relu=True)


def narrow(*channels: int) -> nn.Module:
    channels = channels or (4, 4, 8, 8)
    return ResNet(BasicBlock, (1, 1, 2, 1), channels=channels, stem_type="deep", stem_width=4, num_classes=3)


def chain() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 6, 3), nn.BatchNorm2d(6), nn.ReLU()) for c in (3, 6, 6)))


@cache
def plan_of_today() -> str:
    return plan_se(narrow()).to_json()


class OneSize(nn.Module):
    """Takes one size only, which nothing tells."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.head = nn.Conv2d(5, 4, 3, padding=1), Unit(), nn.Linear(4 * 11 * 13, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unit(self.stem(x)).flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": narrow,
    "called in two ways": Twice,
    "chain": chain,
    "a graph for each mode": lambda: create_feature_extractor(narrow(), ["layer3", "fc"]),
    "traced": lambda: torch.fx.symbolic_trace(narrow()),
    "dense": lambda: DenseNet(4, (2, 2), 8, num_classes=3),
    "within another": lambda: nn.Sequential(narrow(), nn.Identity()),
}
OPTIONS = {"reduction": 4, "bias": True, "include": "layer[24].*", "placement": "3x3"}


@pytest.fixture
def not_recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """When it is called: from there on, nothing may be recorded."""

    def recorded(*args: Any) -> None:
        raise AssertionError("a model was recorded")

    return lambda: monkeypatch.setattr(se_retrofit.surgery.record.runs, "record_run", recorded)


@pytest.mark.parametrize(
    ("name", "training", "options"),
    [
        *((name, False, {"reduction": 2}) for name in NETWORKS),
        ("residual", True, OPTIONS),
        ("a graph for each mode", True, {"reduction": 2}),
    ],
)
def test_a_plan_is_carried_out_on_two_networks(
    name: str, training: bool, options: dict[str, Any], not_recorded: Callable[[], None]
) -> None:
    first, second = (randomised(NETWORKS[name](), seed).train(training) for seed in (0, 1))
    by_options = randomise_se(add_se(second, **options))
    plan = plan_se(first, **options)
    text = plan.to_json()
    not_recorded()
    carried = [add_se(model, plan=Plan.from_json(text)) for model in (first, second)]
    assert plan_of(carried[1]) == plan_of(by_options) == plan
    assert not {id(p) for p in carried[0].parameters()} & {id(p) for p in carried[1].parameters()}
    x = torch.randn(2, 3, 40, 40)
    assert same_tensors(run(copy.deepcopy(carried[1]), x), run(copy.deepcopy(second), x))
    carried[1].load_state_dict(by_options.state_dict())
    assert same_tensors(run(copy.deepcopy(carried[1]), x), run(copy.deepcopy(by_options), x))
    assert list(remove_se(carried[1]).state_dict()) == list(second.state_dict())


def test_each_site_is_carried_out_alone_and_saving_keeps_that(not_recorded: Callable[[], None], tmp_path: Path) -> None:
    model = randomised(chain()).eval()
    plan, x = plan_se(model, 2), torch.randn(2, 3, 16, 16)
    not_recorded()
    for site in plan.sites:
        alone = add_se(model, plan=replace(plan, sites=(site,)))
        assert list(se_modules(alone)) == [site.path]
        assert same_tensors(run(alone, x), run(model, x))
        assert not same_tensors(run(randomise_se(alone), x), run(model, x))
        loaded = load_retrofitted(save_retrofitted(alone, tmp_path / site.path), base=model)
        assert plan_of(loaded).sites == (site,)


def test_the_plan_of_a_network_within_another_and_of_a_part_can_be_carried_out_there() -> None:
    model = randomised(narrow()).eval()
    retrofitted = add_se(model, 2, example_inputs=torch.zeros(1, 3, 64, 64))
    plan = plan_of(nn.Sequential(nn.Identity(), retrofitted))
    within = add_se(nn.Sequential(nn.Identity(), model), plan=plan)
    assert list(se_modules(within)) == [f"1.{site.path}" for site in plan_of(retrofitted).sites] != []
    part = add_se(model.layer3, plan=plan_of(retrofitted.layer3), example_inputs=torch.zeros(1, 4, 8, 8))
    assert list(se_modules(part)) == ["0.se_attention", "1.se_attention"]


def test_se_is_like_the_network_that_it_goes_into(not_recorded: Callable[[], None]) -> None:
    plan = plan_se(narrow())
    with torch.device("meta"):
        empty = narrow()
    not_recorded()
    for model in (narrow().half(), narrow().double(), empty, narrow().train(False)):
        retrofitted = add_se(model, plan=plan)
        like = next(model.parameters())
        for se in se_modules(retrofitted).values():
            assert {(p.dtype, p.device) for p in se.parameters()} == {(like.dtype, like.device)}
            assert se.training == model.training
    # where the value is of another dtype than the block's parameters, that of the value holds
    plan = replace(plan, sites=tuple(replace(site, dtype="float32") for site in plan.sites))
    assert {se.fc[0].weight.dtype for se in se_modules(add_se(narrow().half(), plan=plan)).values()} == {torch.float32}


# Where it does not fit --------------------------------------------------------------------------------------------------

LIBRARY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        return torch.relu(x + out)

def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block())
"""
SITES = ["1.se_attention", "2.se_attention"]
ONES = torch.ones(1, 3, 8, 8)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """The library's network, after some of its text was replaced."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "library", None)  # so that it goes again

    def imported(old: str = "", new: str = "") -> nn.Module:
        assert old in LIBRARY
        (tmp_path / "library.py").write_text(LIBRARY.replace(old, new) if old else LIBRARY)
        del sys.modules["library"]
        importlib.invalidate_caches()
        linecache.checkcache()
        return randomised(importlib.import_module("library").network()).eval()

    return imported


@pytest.fixture
def saved(library: Callable[..., nn.Module], tmp_path: Path) -> tuple[Plan, Path, Tensor]:
    """A plan, a folder, and what the network gave, by the library of today."""
    model = randomise_se(add_se(library(), 2))
    return plan_of(model), save_retrofitted(model, tmp_path / "saved"), model(ONES)


CHANGED = partial(pytest.warns, UserWarning, match=r"source of library\.Block\.forward has changed")
REFUSED = partial(pytest.raises, RetrofitError, match=r"1\.se_attention")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("import torch\n", "import torch\nimport math\n\nSIZE = math.pi\n", nullcontext),
        ("    def forward", "    def extra_repr(self):\n        return 'a block'\n\n    def forward", nullcontext),
        ("out = self.norm(self.conv(x))", "out = self.conv(x)\n        out = self.norm(out)", CHANGED),
        ("return torch.relu(x + out)", "return torch.relu(out)", REFUSED),
    ],
    ids=["lines above", "another method", "written in another way", "another block"],
)
def test_a_later_library_is_fitted_or_told_apart(
    library: Callable[..., nn.Module], saved: tuple[Plan, Path, Tensor], old: str, new: str, told: Callable[[], Any]
) -> None:
    plan, folder, value = saved
    later = library(old, new)
    with told():
        assert list(se_modules(add_se(later, plan=plan))) == SITES
    with told():
        assert torch.equal(load_retrofitted(folder, base=later)(ONES), value)


def test_a_plan_without_edits_is_made_again_silently_with_its_inputs_in_the_models_dtype() -> None:
    model = OneSize().eval()
    plan = plan_se(model, example_inputs=torch.zeros(1, 5, 11, 13))
    earlier = plan.to_dict()
    del earlier["structure"]
    earlier["sites"] = [
        {k: v for k, v in site.items() if k not in ("edits", "shape", "inplace", "dtype")} for site in earlier["sites"]
    ]
    assert plan_of(add_se(model, plan=Plan.from_dict(earlier))) == plan
    del earlier["inputs"]["dtype"]
    assert list(se_modules(add_se(model.double(), plan=Plan.from_dict(earlier)))) == [plan.sites[0].path]


def test_a_plan_of_the_same_class_with_other_widths_is_refused() -> None:
    model = narrow(4, 8, 8, 8)
    before = snapshot(model)
    with pytest.raises(RetrofitError, match=r"layer2\.0\.se_attention .*4 channels"):
        add_se(model, plan=Plan.from_json(plan_of_today()), inplace=True)
    assert_untouched(model, before)


def test_options_beside_a_plan_are_refused() -> None:
    plan = Plan.from_json(plan_of_today())
    with pytest.raises(RetrofitError, match="plan= alone"):
        add_se(narrow(), 16, plan=plan)
    with pytest.raises(TypeError, match=r"plan must be .* got dict"):
        add_se(narrow(), plan=plan.to_dict())  # type: ignore[arg-type]


# Hostile plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("holder", "layer9"), ("holder", 1), ("form", "exec"), ("owner", "os:system"), ("owner", ["os"]), ("method", "__init__"),
        ("span", [0, 0, 0, "1"]), ("span", [10**9] * 4), ("span", [0, 0, 0, 9]), ("span", []), ("statement", "after"),
        ("statement", "norm"), ("target", "open('owned', 'w')"), ("digest", ""), ("digest", None), ("form", "append"),
        ("form", "return"), ("form", "graph"), ("users", [1]), ("more", 1), ("path", "layer1.0.open('owned', 'w')"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*was made again:UserWarning")
def test_a_plan_that_was_tampered_with_runs_nothing(name: str, value: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = randomised(narrow()).eval(), torch.randn(2, 3, 32, 32)
    data = json.loads(plan_of_today())
    paths = [site["path"] for site in data["sites"]]
    (data["sites"][0] if name == "path" else data["sites"][0]["edits"][0])[name] = value
    try:
        retrofitted = add_se(model, plan=Plan.from_json(json.dumps(data)))
    except RetrofitError:
        assert not has_se(model)
    else:  # the plan was made again
        assert list(se_modules(retrofitted)) == paths
        assert same_tensors(run(retrofitted, x), run(model, x))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["sites"][0].update(channels="4"), r"sites\[0\].channels"),
        (lambda d: d["sites"][0].update(channels=True), r"sites\[0\].channels"),
        (lambda d: d["sites"][0].update(parameters=3), "3 parameters"),
        (lambda d: d["sites"][0].update(dtype="nn"), "dtype"),
        (lambda d: d["sites"][0].update(channel_dim=-9), "dim -9"),
        (lambda d: d["sites"].append(d["sites"][0]), "two sites"),
        (lambda d: d["sites"].clear(), "no sites"),
        (lambda d: d.update(sites={}), "sites"),
        (lambda d: d["options"].update(reduction="8"), "reduction"),
        (lambda d: d["options"].update(include=[1]), "include"),
        (lambda d: d["options"].update(glow=1), "glow"),
        (lambda d: d.update(mood=1), "mood"),
        (lambda d: d.pop("skipped"), "skipped"),
    ],
)
def test_a_broken_plan_is_a_clear_error(change: Callable[[Any], Any], says: str) -> None:
    model = narrow()
    data = json.loads(plan_of_today())
    change(data)
    before = snapshot(model)
    with pytest.raises(RetrofitError, match=says):
        add_se(model, plan=Plan.from_json(json.dumps(data)), inplace=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '{"sites": 1}', "[" * 100_000])
def test_text_that_is_no_plan_is_a_clear_error(text: str) -> None:
    with pytest.raises(RetrofitError, match="plan"):
        Plan.from_json(text)
