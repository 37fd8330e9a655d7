"""Bad input: an error that says what was given and what to do, and a model that is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from networks import assert_untouched, random_states, snapshot
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from se_retrofit import InsertSE, RetrofitError, SEAttention, add_se, has_se, plan_of, plan_se, remove_se


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


def test_a_retrofit_error_is_a_value_error() -> None:
    assert issubclass(RetrofitError, ValueError)


@pytest.mark.parametrize("model", [None, "resnet50", torch.zeros(3), {"model": 1}, lambda x: x])
def test_what_is_no_module(model: Any) -> None:
    message = rf"model must be an nn\.Module, got .* of type {type(model).__name__}"
    _refused(model, TypeError, message)
    with pytest.raises(TypeError, match=message):
        remove_se(model)


def test_a_class_in_place_of_an_instance() -> None:
    _refused(ResNet, TypeError, r"got the class ResNet; make an instance of it: ResNet\(\.\.\.\)")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": 0}, RetrofitError, "reduction must be at least 1, got 0"),
        ({"reduction": -8}, RetrofitError, "reduction must be at least 1, got -8"),
        ({"reduction": 1.5}, TypeError, "reduction must be a positive int, got 1.5 of type float"),
        ({"reduction": True}, TypeError, "reduction must be a positive int, got True of type bool"),
        ({"reduction": "8"}, TypeError, "reduction must be a positive int, got '8' of type str"),
        ({"reduction": None}, TypeError, "reduction must be a positive int, got None"),
        ({"min_hidden": 0}, RetrofitError, "min_hidden must be at least 1, got 0"),
        ({"min_hidden": 2.0}, TypeError, "min_hidden must be a positive int, got 2.0"),
        ({"placement": "behind"}, RetrofitError, "placement must be one of 'auto', .*, got 'behind'"),
        ({"placement": None}, TypeError, "placement must be a string, got None"),
        ({"gate": "tanh"}, RetrofitError, "gate must be one of 'identity', 'sigmoid', got 'tanh'"),
        ({"gate": 2}, TypeError, "gate must be a string, got 2"),
        ({"bias": "yes"}, TypeError, "bias must be True or False, got 'yes'"),
        (
            {"include": "layer9.*"},
            RetrofitError,
            r"the pattern 'layer9\.\*' matches none of the 2 blocks found, which are 0, 1",
        ),
        ({"exclude": ["1", "nowhere"]}, RetrofitError, "the pattern 'nowhere' matches none"),
        ({"exclude": "*"}, RetrofitError, "leave no block"),
        ({"include": [1]}, TypeError, r"include must be a pattern of paths or a list of them, got \[1\]"),
        ({"include": 1}, TypeError, "include must be a pattern of paths or a list of them"),
        (
            {"example_inputs": torch.zeros(2, 5, 8, 8)},
            RetrofitError,
            r"can't be run on the given example_inputs.*\(2, 5, 8, 8\)",
        ),
        ({"example_inputs": torch.zeros(3)}, RetrofitError, "can't be run on the given example_inputs"),
        ({"example_inputs": (torch.zeros(2, 3, 8, 8), 1)}, RetrofitError, "can't be run on the given example_inputs"),
        ({"example_inputs": (2, 3, 8, 8)}, TypeError, "example_inputs must hold at least one tensor"),
        ({"example_inputs": "224"}, TypeError, "example_inputs must hold at least one tensor.*got str"),
        ({"example_inputs": [1, 2]}, TypeError, r"example_inputs must .*got list.*example_inputs=\(\[\.\.\.\],\)"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    _refused(_network(), error, message, **options)


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="ratio"):
        add_se(_network(), ratio=8)  # type: ignore[call-arg]


def test_a_model_with_no_convolution() -> None:
    _refused(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), RetrofitError, "Sequential has no convolution")
    _refused(nn.Sequential(nn.Linear(4, 4)), RetrofitError, "nothing to retrofit", example_inputs=torch.zeros(2, 4))
    _refused(nn.Identity(), RetrofitError, "has no convolution")


def test_a_vision_transformer() -> None:
    vit = torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16)
    _refused(
        vit, RetrofitError, "VisionTransformer has no convolutional blocks", example_inputs=torch.zeros(1, 3, 32, 32)
    )


def test_a_model_that_is_retrofitted_already() -> None:
    model = add_se(_network())
    _refused(model, RetrofitError, r"retrofitted already: undo with remove_se\(model\)")
    assert has_se(model)


def test_a_model_with_a_part_that_is_retrofitted_already() -> None:
    _refused(nn.Sequential(add_se(_network())), RetrofitError, "retrofitted already")


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
            with pytest.raises(RetrofitError, match=r"torch\.jit.*: retrofit the Python model"):
                call(scripted)
        with pytest.raises(RetrofitError, match="has no block that can be retrofitted"):  # its source is not at hand
            add_se(nn.Sequential(nn.Conv2d(3, 3, 1), scripted))


def test_a_compiled_model() -> None:
    _refused(
        torch.compile(_network(), backend="eager"), RetrofitError, r"compiled by torch\.compile: retrofit .*_orig_mod"
    )


def test_a_model_in_data_parallel() -> None:
    _refused(nn.DataParallel(_network()), RetrofitError, r"wrapped in DataParallel: retrofit model\.module, then wrap")


def test_a_model_with_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for call in (plan_se, add_se):
        with pytest.raises(RetrofitError, match=r"lazy parameters.*call the model once"):
            call(model)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


class _Broken(nn.Module):
    """A network whose forward raises after it has set an attribute of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _network()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.body(x)
        raise KeyError("a bug of the user")


@pytest.mark.parametrize("options", [{}, {"example_inputs": torch.zeros(1, 3, 8, 8)}])
def test_a_forward_that_raises(options: dict[str, Any]) -> None:
    model = _Broken()
    _refused(model, RetrofitError, "_Broken can't be run .*KeyError: 'a bug of the user'", **options)
    assert model.calls == 0


class _Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise copy.Error("no copies")


def test_a_model_that_cannot_be_copied() -> None:
    model = _Uncopyable()
    with pytest.raises(RetrofitError, match=r"_Uncopyable.* can't be copied: .*no copies.*inplace=True"):
        add_se(model)
    assert len(plan_se(model).sites) == 1
    assert add_se(model, inplace=True) is model


def test_the_pass_takes_graph_modules_only() -> None:
    model = _network()
    before = snapshot(model)
    with pytest.raises(TypeError, match="takes a GraphModule, got Sequential; for other modules call add_se"):
        InsertSE()(model)  # type: ignore[arg-type]
    assert_untouched(model, before)
    with pytest.raises(RetrofitError, match="reduction"):
        InsertSE(reduction=0)(torch.fx.symbolic_trace(model))


def test_inputs_in_the_place_of_the_reduction_are_told_their_name_and_not_printed_whole() -> None:
    with pytest.raises(TypeError, match=r"reduction must be a positive int.*example_inputs=") as caught:
        add_se(torchvision.models.resnet18(), torch.rand(1, 3, 64, 64))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200
