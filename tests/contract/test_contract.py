"""The contract, point by point, on networks of both libraries."""

from __future__ import annotations

import copy
import pickle
import random
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
    random_states,
    se_keys,
    se_modules,
    snapshot,
)
from numeric import check_promises
from sweeps import swept
from torch import nn

import se_retrofit.surgery.splice.carry
from se_retrofit import RetrofitError, add_se, has_se, plan_of, plan_se, remove_se
from se_retrofit.models import Base

Pair = tuple[Network, nn.Module, nn.Module]


# Small networks of most kinds of block; the sweeps take one of each further structure. What a network computes and how it trains
# is tested on one of every structure in tests/sweeps/test_families.py.
EVERY_TIME = "timm/test_resnet", "torchvision/alexnet", "torchvision/squeezenet1_1", "timm/test_convnext"
IN_SWEEPS = (
    "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/densenet121", "timm/hrnet_w18_small"
)  # fmt: skip


@pytest.fixture(scope="module", params=swept(EVERY_TIME, IN_SWEEPS))
def pair(request: pytest.FixtureRequest) -> Pair:
    """A network, a model of it, and the retrofitted model. Tests copy what they change."""
    network = NETWORKS[request.param]
    model = network.build()
    return network, model, add_se(model)


# 1. Same function ---------------------------


def test_outputs_gradients_and_statistics_are_the_same_bit_for_bit_at_any_size_and_batch(pair: Pair) -> None:
    network, model, _ = pair
    images = network.input(batch=2), network.input(batch=1, wider=32), network.input(batch=3)
    check_promises(copy.deepcopy(model), lambda net: [net(x) for x in images])


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
    before, new = model.state_dict(), se_keys(retrofitted)
    assert set(retrofitted.state_dict()) - set(before) == new
    assert [n for n, _ in retrofitted.named_parameters() if n not in new] == [n for n, _ in model.named_parameters()]
    target = copy.deepcopy(retrofitted)
    for key in before:
        target.state_dict()[key].zero_()
    result = target.load_state_dict(before, strict=False)
    assert set(result.missing_keys) == new
    assert result.unexpected_keys == []
    assert_same_function(target, model, network.input())


# 4. Undo, 5. All or nothing ---------------------------


def test_remove_se_leaves_no_trace(pair: Pair) -> None:
    _, model, retrofitted = pair
    before, after, shown = snapshot(model), snapshot(retrofitted), repr(model)
    with pytest.raises(RetrofitError, match="nothing to remove"):
        remove_se(remove_se(retrofitted))
    assert_untouched(retrofitted, after)
    parameters = {id(p) for p in model.parameters()}
    assert add_se(model, inplace=True) is model
    assert parameters <= {id(p) for p in model.parameters()}
    assert has_se(model)
    assert remove_se(model, inplace=True) is model
    assert not has_se(model)
    assert_untouched(model, before)
    assert repr(model) == shown


def test_a_plan_and_a_failure_half_way_leave_the_model_untouched(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = pair
    before = snapshot(model)
    plan_se(model)
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
    assert done[0]
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


# 7. A good citizen: test_citizen.py, and for each attention tests/attention/test_citizens.py ---------------------------

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
