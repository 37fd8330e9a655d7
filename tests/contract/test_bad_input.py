"""Bad input: an error that says what was given and what to do, and a model that is as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from networks import assert_untouched, random_states, snapshot
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from se_retrofit import InsertSE, RetrofitError, SEAttention, add_se, has_se, plan_of, plan_se, record, remove_se


def _network() -> nn.Module:
    """A small residual network."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def _refused(model: Any, error: type[Exception], message: str, **options: Any) -> None:
    """plan_se and add_se, on a copy and in place, raise with this message; nothing has changed."""
    before = snapshot(model) if isinstance(model, nn.Module) else None
    randomness = list(random_states())
    calls: list[Callable[[], Any]] = [
        lambda: plan_se(model, **options),
        lambda: add_se(model, **options),
        lambda: add_se(model, inplace=True, **options),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    if before is not None:
        assert_untouched(model, before)
    assert list(random_states()) == randomness


@pytest.mark.parametrize("model", [None, "resnet50", torch.zeros(3), {"model": 1}, lambda x: x])
def test_what_is_no_module(model: Any) -> None:
    fact = rf"nn\.Module.* {type(model).__name__}"
    _refused(model, TypeError, fact)
    for call in (remove_se, has_se, plan_of, record):
        with pytest.raises(TypeError, match=fact):
            call(model)


def test_what_is_no_flag() -> None:
    model = add_se(_network())
    calls: tuple[Callable[..., Any], ...] = (
        lambda inplace: add_se(_network(), inplace=inplace),
        partial(remove_se, model),
    )
    for call, flag in itertools.product(calls, ("no", 1, torch.zeros(2))):
        with pytest.raises(TypeError, match="inplace must be True or False"):
            call(inplace=flag)
    assert has_se(model)


class _Broken(nn.Module):
    """A network whose forward raises after it has set an attribute of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = _network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.body(x)
        raise KeyError("a bug of the user")


@pytest.mark.parametrize(
    ("make", "error", "fact"),
    [
        (lambda: ResNet, TypeError, r"ResNet\(\.\.\.\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), RetrofitError, "Sequential has no convolution"),
        (lambda: add_se(_network()), RetrofitError, r"remove_se\(model\)"),
        (lambda: nn.Sequential(add_se(_network())), RetrofitError, "retrofitted already"),
        (lambda: torch.compile(_network(), backend="eager"), RetrofitError, r"torch\.compile.*_orig_mod"),
        (lambda: nn.DataParallel(_network()), RetrofitError, r"DataParallel.*model\.module"),
        (_Broken, RetrofitError, "_Broken .*KeyError: 'a bug of the user'"),
    ],
)
def test_models_that_cannot_be_retrofitted(make: Callable[[], Any], error: type[Exception], fact: str) -> None:
    _refused(make(), error, fact)


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"reduction": 0}, RetrofitError, "reduction .*0"),
        ({"reduction": 1.5}, TypeError, "reduction .*1.5"),
        ({"reduction": True}, TypeError, "reduction .*True"),
        ({"reduction": "8"}, TypeError, "reduction .*'8'"),
        ({"reduction": None}, TypeError, "reduction .*None"),
        ({"min_hidden": 0}, RetrofitError, "min_hidden .*0"),
        ({"min_hidden": 2.0}, TypeError, "min_hidden .*2.0"),
        ({"placement": "behind"}, RetrofitError, "placement .*'auto', .*'behind'"),
        ({"placement": None}, TypeError, "placement .*None"),
        ({"gate": "tanh"}, RetrofitError, "gate .*'identity', 'sigmoid', .*'tanh'"),
        ({"gate": 2}, TypeError, "gate .*2"),
        ({"bias": "yes"}, TypeError, "bias .*'yes'"),
        ({"include": "layer9.*"}, RetrofitError, r"'layer9\.\*' .* 2 .* 0, 1"),
        ({"exclude": ["1", "nowhere"]}, RetrofitError, "'nowhere'"),
        ({"exclude": "*"}, RetrofitError, "leave no block"),
        ({"include": [1]}, TypeError, r"include .*\[1\]"),
        ({"include": 1}, TypeError, "include .*1"),
        ({"example_inputs": torch.zeros(2, 5, 8, 8)}, RetrofitError, r"example_inputs.*\(2, 5, 8, 8\)"),
        ({"example_inputs": torch.zeros(3)}, RetrofitError, "example_inputs"),
        ({"example_inputs": (torch.zeros(2, 3, 8, 8), 1)}, RetrofitError, "example_inputs"),
        ({"example_inputs": (2, 3, 8, 8)}, TypeError, "example_inputs .*tensor"),
        ({"example_inputs": "224"}, TypeError, "example_inputs .*str"),
        ({"example_inputs": [1, 2]}, TypeError, r"example_inputs .*list.*example_inputs=\(\[\.\.\.\],\)"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], fact: str) -> None:
    _refused(_network(), error, fact, **options)


def test_an_unknown_option() -> None:
    assert issubclass(RetrofitError, ValueError)
    with pytest.raises(TypeError, match="ratio"):
        add_se(_network(), ratio=8)  # type: ignore[call-arg]


def test_remove_se_and_plan_of_without_a_retrofit() -> None:
    model = nn.Sequential(_network(), SEAttention(4, 2))  # an SE of the user's own is none of ours
    before = snapshot(model)
    assert not has_se(model)
    for verb in (remove_se, plan_of):
        with pytest.raises(RetrofitError, match="no SE inserted by add_se"):
            verb(model)
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_or_traced_model() -> None:
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 8, 8))):
        scripted = make(_network())
        for call in (plan_se, add_se):
            with pytest.raises(RetrofitError, match=r"torch\.jit"):
                call(scripted)
        with pytest.raises(RetrofitError, match="no block"):  # its source is not at hand
            add_se(nn.Sequential(nn.Conv2d(3, 3, 1), scripted))


def test_a_model_with_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for call in (plan_se, add_se):
        with pytest.raises(RetrofitError, match=r"lazy parameters.*call the model once"):
            call(model)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


class _Uncopyable(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise copy.Error("no copies")


def test_a_model_that_cannot_be_copied() -> None:
    model = _Uncopyable(_network())
    with pytest.raises(RetrofitError, match=r"_Uncopyable.*no copies.*inplace=True"):
        add_se(model)
    assert len(plan_se(model).sites) == 1
    assert add_se(model, inplace=True) is model


def test_the_pass_takes_graph_modules_only() -> None:
    model = _network()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"Sequential.*add_se"):
        InsertSE()(model)  # type: ignore[arg-type]
    assert_untouched(model, before)
    with pytest.raises(RetrofitError, match="reduction"):
        InsertSE(reduction=0)(torch.fx.symbolic_trace(model))


def test_inputs_in_the_place_of_the_reduction_are_told_their_name_and_not_printed_whole() -> None:
    with pytest.raises(TypeError, match=r"reduction must be a positive int.*example_inputs=") as caught:
        add_se(torchvision.models.resnet18(), torch.rand(1, 3, 64, 64))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
