"""The contract, point by point, on networks of both libraries."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import OrderedDict
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
EVERY_TIME = (
    "torchvision/resnet18", "torchvision/alexnet", "torchvision/squeezenet1_1",
    "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "timm/convnext_atto",
)  # fmt: skip
IN_SWEEPS = "torchvision/densenet121", "timm/hrnet_w18_small"


@pytest.fixture(scope="module", params=swept(EVERY_TIME, IN_SWEEPS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """A network, a model of it, and the retrofitted model. Tests copy what they change."""
    return _pair(request.param)


# 1. Same function ---------------------------


def test_outputs_are_equal_bit_for_bit_in_eval_mode_at_any_size_and_batch(pair: Pair) -> None:
    network, model, retrofitted = pair
    for x in (network.input(batch=2), network.input(batch=1, wider=32), network.input(batch=3)):
        assert_same_function(retrofitted, model, x)


def test_outputs_gradients_and_running_statistics_are_equal_bit_for_bit_in_train_mode(pair: Pair) -> None:
    network, model, retrofitted = pair
    model, retrofitted = copy.deepcopy(model).train(), copy.deepcopy(retrofitted).train()
    x = network.input(train=True)
    ours, theirs = gradients(retrofitted, x), gradients(model, x)
    assert sum(g is not None and bool(g.count_nonzero()) for g in theirs.values()) > len(theirs) // 2
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            assert torch.equal(ours[name], gradient), name
    for (name, buffer), other in zip(model.named_buffers(), retrofitted.buffers(), strict=True):
        assert torch.equal(other, buffer), name
    with torch.no_grad():
        assert same_tensors(run(retrofitted, x), run(model, x))


def test_each_se_module_takes_part_once_and_can_learn_from_the_first_step(pair: Pair) -> None:
    network, _, retrofitted = pair
    retrofitted = copy.deepcopy(retrofitted).train()
    calls: list[str] = []
    for path, se in se_modules(retrofitted).items():
        se.register_forward_hook(lambda *_, path=path: calls.append(path))
    found = gradients(retrofitted, network.input(train=True))
    assert sorted(calls) == sorted(se_modules(retrofitted))
    for path in calls:
        gradient = found[f"{path}.fc.2.weight"]
        assert gradient is not None, path
        assert gradient.abs().max() > 0, path


def test_the_gates_act_on_the_outputs(pair: Pair) -> None:
    network, model, retrofitted = pair
    x = network.input()
    with torch.no_grad():
        before, after = run(model, x)[0], run(randomise_se(copy.deepcopy(retrofitted)), x)[0]
    assert not torch.equal(before, after)


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
    memory = _memory(retrofitted)
    assert {name: memory[name] for name in _memory(reference)} == _memory(reference)
    with torch.no_grad():
        x = network.input().to(memory_format=torch.channels_last)
        reference.eval()(x)
        retrofitted.eval()(x)
    assert ours == theirs
    assert len(ours) >= len(se_modules(retrofitted))


# 3. Same keys ---------------------------


def test_the_original_keys_stay_with_their_tensors_and_only_se_keys_are_new(pair: Pair) -> None:
    _, model, retrofitted = pair
    before, after = model.state_dict(), retrofitted.state_dict()
    assert set(after) - set(before) == se_keys(retrofitted)
    assert [key for key in after if key not in se_keys(retrofitted)] == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert [n for n, _ in retrofitted.named_parameters() if n not in se_keys(retrofitted)] == [
        n for n, _ in model.named_parameters()
    ]


def test_an_original_checkpoint_loads_with_just_the_se_keys_missing(pair: Pair) -> None:
    network, model, retrofitted = pair
    target = copy.deepcopy(retrofitted)
    with torch.no_grad():
        for key, value in target.state_dict().items():
            if key not in se_keys(target):
                value.zero_()
    result = target.load_state_dict(model.state_dict(), strict=False)
    assert set(result.missing_keys) == se_keys(retrofitted)
    assert result.unexpected_keys == []
    assert_same_function(target, model, network.input())


# 4. Undo ---------------------------


def test_remove_se_in_place_leaves_no_trace(pair: Pair) -> None:
    _, model, _ = pair
    model = copy.deepcopy(model)
    before, shown = snapshot(model), repr(model)
    parameters = list(model.parameters())
    retrofitted = add_se(model, inplace=True)
    assert {id(p) for p in parameters} <= {id(p) for p in retrofitted.parameters()}
    assert has_se(model)
    assert remove_se(model, inplace=True) is model
    assert not has_se(model)
    assert_untouched(model, before)
    assert repr(model) == shown


def test_remove_se_gives_a_copy_of_the_original_structure(pair: Pair) -> None:
    network, model, retrofitted = pair
    before = snapshot(retrofitted)
    removed = remove_se(retrofitted)
    assert_untouched(retrofitted, before)
    assert [(path, type(m)) for path, m in removed.named_modules()] == [
        (path, type(m)) for path, m in model.named_modules()
    ]
    assert list(removed.state_dict()) == list(model.state_dict())
    assert_same_function(removed, model, network.input())
    with pytest.raises(RetrofitError, match="nothing to remove"):
        remove_se(removed)


# 5. All or nothing ---------------------------


def test_planning_and_copying_leave_the_model_untouched(pair: Pair) -> None:
    _, model, _ = pair
    before = snapshot(model)
    plan_se(model)
    assert_untouched(model, before)
    add_se(model, reduction=4, gate="sigmoid", bias=True)
    assert_untouched(model, before)


def test_a_failure_half_way_leaves_the_model_untouched(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = pair
    before = snapshot(model)
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
    plan = plan_se(model)
    assert plan == plan_of(retrofitted)
    add_se(model)
    assert list(random_states()) == before
    assert capfd.readouterr() == ("", "")


def test_nothing_is_monkey_patched() -> None:
    watched = [nn.Module, torch.Tensor, torch, torch.nn.functional, torch.fx.Tracer, torch.fx.Proxy, torch.fx.Graph]
    watched += [torch.fx._symbolic_trace, torchvision.models.resnet.BasicBlock, nn.Sequential, nn.Conv2d, copy, pickle]
    before = [dict(vars(thing)) for thing in watched]
    remove_se(add_se(torchvision.models.resnet18()))
    for thing, state in zip(watched, before, strict=True):
        assert {k: v for k, v in vars(thing).items() if not k.startswith("__")} == {
            k: v for k, v in state.items() if not k.startswith("__")
        }, thing


# 7. A good citizen (more in test_citizen.py) ---------------------------


def test_copies_and_pickles_are_retrofitted_and_independent(pair: Pair) -> None:
    network, _, retrofitted = pair
    changed = randomise_se(copy.deepcopy(retrofitted))
    for twin in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert_same_function(twin, changed, network.input())
        assert [type(m) for m in twin.modules()] == [type(m) for m in changed.modules()]
        assert plan_of(twin) == plan_of(retrofitted)
        assert not {t.data_ptr() for t in twin.parameters()} & {t.data_ptr() for t in changed.parameters()}


def test_a_state_dict_goes_from_one_retrofitted_model_to_another(pair: Pair) -> None:
    network, model, retrofitted = pair
    trained = randomise_se(copy.deepcopy(retrofitted))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = add_se(model)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert isinstance(fresh.state_dict(), OrderedDict)
    assert_same_function(fresh, trained, network.input())


# 8. Honest refusal ---------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_in_which_nothing_can_be_retrofitted_is_refused_with_the_reason(name: str) -> None:
    model = Base.of(name).build()
    before = snapshot(model)
    for call in (plan_se, add_se, lambda m: add_se(m, inplace=True)):
        with pytest.raises(RetrofitError, match=REFUSED[name]) as error:
            call(model)
        assert type(model).__name__ in str(error.value)
    assert_untouched(model, before)


def test_blocks_that_have_attention_already_are_listed_and_left_as_they_are() -> None:
    model = NETWORKS["torchvision/mobilenet_v3_small"].build()
    native = {path for path, m in model.named_modules() if type(m).__name__ == "SqueezeExcitation"}
    plan = plan_se(model)
    left = {skip.block for skip in plan.skipped if skip.reason == "has channel attention already"}
    assert left == {path.rpartition(".block.")[0] for path in native}
    retrofitted = add_se(model)
    assert not any(se_modules(retrofitted.get_submodule(block)) for block in left)
    assert f"features.1, features.4, features.5 and {len(left) - 3} more: has channel attention already" in str(plan)


class _DataDependent(nn.Module):
    """A residual block whose forward looks at its data, which a run without values can't show."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() > 1e6:
            return x
        return x + torch.relu(self.conv(x))


class _Remembering(_DataDependent):
    """A residual block whose forward sets an attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = torch.relu(self.conv(x))
        return x + self.last


class _Strict(nn.Sequential):
    """A network that treats a block of this very class in one way, and any other in another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = block(x) if type(block) is not _Remembering else block(x) * 2
        return x


def test_a_block_that_looks_at_values_or_sets_attributes_gets_its_se() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), _DataDependent(8), _Remembering(8), torchvision.models.resnet.BasicBlock(8, 8)
    ).eval()
    assert [site.block for site in plan_se(model).sites] == ["1", "2", "3"]
    assert_same_function(add_se(model), model, torch.randn(2, 3, 9, 9))


def test_a_block_that_its_network_would_treat_otherwise_is_listed_with_the_reason() -> None:
    model = _Strict(nn.Conv2d(3, 8, 3), _Remembering(8), torchvision.models.resnet.BasicBlock(8, 8)).eval()
    plan = plan_se(model)
    assert [site.block for site in plan.sites] == ["2"]
    skipped = plan.skipped[-1]
    assert [skip.block for skip in plan.skipped] == ["0", "1"]
    assert "looks at the class of the block" in skipped.reason
    assert_same_function(add_se(model), model, torch.randn(2, 3, 9, 9))


def test_every_se_module_is_reported_by_the_plan_with_its_true_figures(pair: Pair) -> None:
    _, model, retrofitted = pair
    plan = plan_of(retrofitted)
    found = se_modules(retrofitted)
    assert [site.path for site in plan.sites] == list(found) or {site.path for site in plan.sites} == set(found)
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
