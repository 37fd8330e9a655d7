"""The contract, point by point, on networks of both libraries."""

from __future__ import annotations

import copy
import pickle
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from networks import (
    NETWORKS,
    REFUSED,
    Network,
    assert_same_function,
    assert_untouched,
    gradients,
    random_states,
    randomise_se,
    run,
    same_tensors,
    se_keys,
    se_modules,
    snapshot,
)
from sweeps import swept
from torch import nn

import se_retrofit.surgery.splice.carry
from se_retrofit import RetrofitError, SEAttention, add_se, has_se, plan_of, plan_se, remove_se
from se_retrofit.models import Base

Pair = tuple[Network, nn.Module, nn.Module]


@lru_cache(maxsize=2)
def _pair(name: str) -> Pair:
    network = NETWORKS[name]
    model = network.build()
    return network, model, add_se(model)


# Small networks of most kinds of block; the sweeps take one of each further structure. What a network computes and how it trains
# is tested on one of every structure in tests/sweeps/test_families.py.
EVERY_TIME = "timm/test_resnet", "torchvision/alexnet", "torchvision/squeezenet1_1", "timm/test_convnext"
IN_SWEEPS = (
    "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/densenet121", "timm/hrnet_w18_small"
)  # fmt: skip


@pytest.fixture(scope="module", params=swept(EVERY_TIME, IN_SWEEPS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """A network, a model of it, and the retrofitted model. Tests copy what they change."""
    return _pair(request.param)


# 1. Same function ---------------------------


def test_outputs_are_equal_bit_for_bit_in_eval_mode_at_any_size_and_batch(pair: Pair) -> None:
    network, model, retrofitted = pair
    for x in (network.input(batch=2), network.input(batch=1, wider=32), network.input(batch=3)):
        assert_same_function(retrofitted, model, x)


def test_in_train_mode_outputs_gradients_and_statistics_are_equal_and_each_se_module_learns(pair: Pair) -> None:
    network, model, retrofitted = pair
    model, retrofitted = copy.deepcopy(model).train(), copy.deepcopy(retrofitted).train()
    calls: list[str] = []
    for path, se in se_modules(retrofitted).items():
        se.register_forward_hook(lambda *_, path=path: calls.append(path))
    x = network.input(train=True)
    ours, theirs = gradients(retrofitted, x), gradients(model, x)
    assert sorted(calls) == sorted(se_modules(retrofitted))
    assert all(ours[f"{path}.fc.2.weight"].any() for path in calls)
    assert sum(g is not None and bool(g.count_nonzero()) for g in theirs.values()) > len(theirs) // 2
    for name, gradient in theirs.items():
        assert ours[name] is None if gradient is None else torch.equal(ours[name], gradient), name
    for (name, buffer), other in zip(model.named_buffers(), retrofitted.buffers(), strict=True):
        assert torch.equal(other, buffer), name
    with torch.no_grad():
        assert same_tensors(run(retrofitted, x), run(model, x))


# 2. Same object ---------------------------


def _marked(model: nn.Module, calls: list[str]) -> nn.Module:
    """A copy of the model with irregularities that a retrofit could lose."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    for i, module in enumerate(model.modules()):
        module.train(i % 5 == 0) if not list(module.children()) else setattr(module, "training", i % 2 == 0)
        module.note = f"module {i}"
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
    return model


def _memory(model: nn.Module) -> dict[str, Any]:
    return {name: (t.stride(), t.dtype, t.device, t.requires_grad) for name, t in model.named_parameters()}


def test_classes_attributes_hooks_and_flags_stay(pair: Pair) -> None:
    network, model, eval_mode = pair
    assert not any(module.training for module in eval_mode.modules())
    ours: list[str] = []
    theirs: list[str] = []
    marked, reference = _marked(model, ours), _marked(model, theirs)
    retrofitted = add_se(marked, inplace=True)
    assert retrofitted is marked
    originals, now = dict(reference.named_modules()), dict(retrofitted.named_modules())
    assert type(retrofitted).__name__ in (type(model).__name__, f"SE{type(model).__name__}")
    for path, module in originals.items():
        assert isinstance(now[path], type(module)), path
        assert set(dir(type(now[path]))) >= set(dir(type(module)))
        assert now[path].training == module.training, path
        for name, value in vars(module).items():
            assert name in vars(now[path]), (path, name)
            if isinstance(value, (bool, int, float, str, tuple, type(None))):
                assert vars(now[path])[name] == value, (path, name)
    assert _memory(reference).items() <= _memory(retrofitted).items()
    with torch.no_grad():
        x = network.input().to(memory_format=torch.channels_last)
        reference.eval()(x)
        retrofitted.eval()(x)
    assert ours == theirs
    assert len(ours) >= len(se_modules(retrofitted))


# 3. Same keys ---------------------------


def test_only_se_keys_are_new_and_an_original_checkpoint_loads_with_just_these_missing(pair: Pair) -> None:
    network, model, retrofitted = pair
    before, after, new = model.state_dict(), retrofitted.state_dict(), se_keys(retrofitted)
    assert set(after) - set(before) == new
    assert [key for key in after if key not in new] == list(before)
    assert [n for n, _ in retrofitted.named_parameters() if n not in new] == [n for n, _ in model.named_parameters()]
    target = copy.deepcopy(retrofitted)
    for key, value in target.state_dict().items():
        if key not in new:
            assert torch.equal(value, before[key]), key
            value.zero_()
    result = target.load_state_dict(before, strict=False)
    assert set(result.missing_keys) == new
    assert result.unexpected_keys == []
    assert_same_function(target, model, network.input())


# 4. Undo, 5. All or nothing ---------------------------


def test_remove_se_leaves_no_trace(pair: Pair) -> None:
    network, model, retrofitted = pair
    before, after, shown = snapshot(model), snapshot(retrofitted), repr(model)
    removed = remove_se(retrofitted)
    assert_untouched(retrofitted, after)
    assert [(path, type(m)) for path, m in removed.named_modules()] == [
        (path, type(m)) for path, m in model.named_modules()
    ]
    assert list(removed.state_dict()) == list(model.state_dict())
    assert_same_function(removed, model, network.input())
    with pytest.raises(RetrofitError, match="nothing to remove"):
        remove_se(removed)
    parameters = {id(p) for p in model.parameters()}
    assert add_se(model, inplace=True) is model
    assert parameters <= {id(p) for p in model.parameters()}
    assert has_se(model)
    assert remove_se(model, inplace=True) is model
    assert not has_se(model)
    assert_untouched(model, before)
    assert repr(model) == shown


def test_a_plan_a_copy_and_a_failure_half_way_leave_the_model_untouched(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, _ = pair
    before = snapshot(model)
    plan_se(model)
    add_se(model, reduction=4, gate="sigmoid", bias=True)
    assert_untouched(model, before)
    real, done = se_retrofit.surgery.splice.carry.apply_edits, []

    def failing(model: nn.Module, edits: dict[Any, Any]) -> None:
        half = dict(list(edits.items())[: (len(edits) + 1) // 2])
        real(model, half)
        done.append(half)
        raise MemoryError("in the middle")

    monkeypatch.setattr(se_retrofit.surgery.splice.carry, "apply_edits", failing)
    with pytest.raises(MemoryError, match="in the middle"):
        add_se(model, inplace=True)
    assert done
    assert_untouched(model, before)


# 6. Deterministic and silent ---------------------------


def test_the_same_model_gets_the_same_plan_and_the_random_state_is_untouched(
    pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    _, model, retrofitted = pair
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = list(random_states())
    assert plan_se(model) == plan_of(retrofitted)
    add_se(model)
    assert list(random_states()) == before
    assert capfd.readouterr() == ("", "")


def test_nothing_is_monkey_patched() -> None:
    watched = [nn.Module, torch.Tensor, torch, torch.nn.functional, torch.fx.Tracer, torch.fx.Proxy, torch.fx.Graph]
    watched += [torch.fx._symbolic_trace, torchvision.models.resnet.BasicBlock, nn.Sequential, nn.Conv2d, copy, pickle]

    def state() -> list[dict[str, Any]]:
        return [{k: v for k, v in vars(thing).items() if not k.startswith("__")} for thing in watched]

    before = state()
    remove_se(add_se(torchvision.models.resnet18()))
    for thing, then, now in zip(watched, before, state(), strict=True):
        assert now == then, thing


# 7. A good citizen (more in test_citizen.py) ---------------------------


def test_copies_pickles_and_state_dicts_are_those_of_a_retrofitted_network(pair: Pair) -> None:
    network, model, retrofitted = pair
    changed = randomise_se(copy.deepcopy(retrofitted))
    loaded = add_se(model)
    loaded.load_state_dict(changed.state_dict())
    for twin in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed)), loaded):
        assert_same_function(twin, changed, network.input())
        assert [type(m) for m in twin.modules()] == [type(m) for m in changed.modules()]
        assert plan_of(twin) == plan_of(retrofitted)
        assert not {t.data_ptr() for t in twin.parameters()} & {t.data_ptr() for t in changed.parameters()}


# 8. Honest refusal ---------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_in_which_nothing_can_be_retrofitted_is_refused_with_the_reason(name: str) -> None:
    model = Base.of(name).build()
    before = snapshot(model)
    for inplace in (False, True):
        with pytest.raises(RetrofitError, match=f"{type(model).__name__} .*{REFUSED[name]}"):
            add_se(model, inplace=inplace)
    assert_untouched(model, before)


def test_blocks_that_have_attention_already_are_listed_and_left_as_they_are() -> None:
    model = NETWORKS["torchvision/mobilenet_v3_small"].build()
    native = {path for path, m in model.named_modules() if type(m).__name__ == "SqueezeExcitation"}
    plan = plan_se(model)
    left = {skip.block for skip in plan.skipped if skip.reason == "has channel attention already"}
    assert left == {path.rpartition(".block.")[0] for path in native}
    assert not left & {site.block for site in plan.sites}
    assert f"features.1, features.4, features.5 and {len(left) - 3} more: has channel attention already" in str(plan)


def test_every_se_module_is_reported_by_the_plan_with_its_true_figures(pair: Pair) -> None:
    _, model, retrofitted = pair
    plan = plan_of(retrofitted)
    found = se_modules(retrofitted)
    assert {site.path for site in plan.sites} == set(found)
    for site in plan.sites:
        se = found[site.path]
        assert isinstance(se, SEAttention)
        assert (se.channel, se.channel_dim) == (site.channels, site.channel_dim)
        assert se.hidden == max(site.channels // 8, 4)
        assert site.parameters == sum(p.numel() for p in se.parameters())
        assert isinstance(model.get_submodule(site.block), nn.Module)
    added = sum(p.numel() for p in retrofitted.parameters()) - sum(p.numel() for p in model.parameters())
    assert plan.parameters == added
    assert f"{len(plan.sites)} SE modules, {added:,} parameters" in str(plan)
