"""Bad input: an error that says what was given and what to do; what goes wrong in the package itself is told as such. And the model
is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import assert_untouched, random_states, snapshot
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from se_retrofit import InsertSE, RetrofitError, SEAttention, add_se, has_se, plan_of, plan_se, record, remove_se

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def _network() -> nn.Module:
    """A small residual network."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


VERBS = {"plan_se": plan_se, "add_se": add_se, "in place": partial(add_se, inplace=True)}


def _refused(call: Callable[..., Any], model: Any, error: type[Exception], message: str, **options: Any) -> None:
    """A call raises with this message; nothing has changed."""
    seen = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
    before, randomness = snapshot(model) if seen else {}, list(random_states())
    with pytest.raises(error, match=message) as raised:
        call(model, **options)
    assert len(str(raised.value)) < 400
    if seen:
        assert_untouched(model, before)
    assert list(random_states()) == randomness


@pytest.mark.parametrize("call", [*VERBS.values(), remove_se, has_se, plan_of, record])
@pytest.mark.parametrize("model", [None, "resnet50", torch.zeros(3), {"model": 1}, lambda x: x])
def test_what_is_no_module(call: Callable[..., Any], model: Any) -> None:
    _refused(call, model, TypeError, rf"nn\.Module.* {type(model).__name__}")


@pytest.mark.parametrize("flag", ["no", 1, torch.zeros(2)])
def test_what_is_no_flag(flag: Any) -> None:
    for verb, model in ((add_se, _network()), (remove_se, add_se(_network()))):
        _refused(verb, model, TypeError, "inplace must be True or False", inplace=flag)


class _Broken(nn.Module):
    """A network whose forward raises after it has set an attribute of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = _network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.body(x)
        raise KeyError("a bug of the user")


class _Counting(BasicBlock):
    """A unit behind a chain in the same module, which counts its parameters."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x).relu() * len(list(self.parameters())))


@pytest.mark.parametrize("call", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(
    ("make", "error", "fact"),
    [
        (lambda: ResNet, TypeError, r"ResNet\(\.\.\.\)"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            RetrofitError,
            "Sequential has no convolution.*example_inputs",
        ),
        (lambda: add_se(_network()), RetrofitError, r"remove_se\(model\)"),
        (lambda: nn.Sequential(add_se(_network())), RetrofitError, "retrofitted already"),
        (lambda: torch.compile(_network(), backend="eager"), RetrofitError, r"torch\.compile.*_orig_mod"),
        (lambda: nn.DataParallel(_network()), RetrofitError, r"DataParallel.*model\.module"),
        (lambda: torch.jit.script(_network()), RetrofitError, r"torch\.jit"),
        (lambda: torch.jit.trace(_network(), torch.zeros(1, 3, 8, 8)), RetrofitError, r"torch\.jit"),
        # the source of its block is not at hand
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(_network())), RetrofitError, "no block"),
        (_Broken, RetrofitError, "_Broken .*KeyError: 'a bug of the user'"),
        (lambda: nn.Sequential(_Counting(8, 8)), RetrofitError, r"; 0: with SE in it, .* its parameters.*may name 0"),
    ],
)
def test_models_that_cannot_be_retrofitted(
    call: Callable[..., Any], make: Callable[[], Any], error: type[Exception], fact: str
) -> None:
    _refused(call, make(), error, fact)


@pytest.mark.parametrize("call", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"reduction": 0}, RetrofitError, "reduction .*0"),
        ({"reduction": 1.5}, TypeError, "reduction .*1.5"),
        ({"reduction": True}, TypeError, "reduction .*True"),
        ({"reduction": "8"}, TypeError, "reduction .*'8'"),
        ({"reduction": None}, TypeError, "reduction .*None"),
        # inputs in its place are told their name, and not printed whole
        ({"reduction": torch.rand(1, 3, 64, 64)}, TypeError, "reduction must be a positive int.*example_inputs="),
        ({"min_hidden": 0}, RetrofitError, "min_hidden .*0"),
        ({"min_hidden": 10**9}, RetrofitError, "min_hidden must be at most 65536, got 1000000000"),
        ({"min_hidden": 2.0}, TypeError, "min_hidden .*2.0"),
        ({"placement": "behind"}, RetrofitError, "placement .*'auto', .*'behind'"),
        ({"placement": None}, TypeError, "placement .*None"),
        ({"gate": "tanh"}, RetrofitError, "gate .*'identity', 'sigmoid', .*'tanh'"),
        ({"gate": 2}, TypeError, "gate .*2"),
        ({"bias": "yes"}, TypeError, "bias .*'yes'"),
        ({"attention": "senet"}, RetrofitError, "'se', 'eca', 'cbam', 'static', .*'senet'"),
        ({"attention": 3}, TypeError, "attention .*3"),
        ({"attention": nn.Identity()}, TypeError, "one Identity"),
        ({"attention": "eca", "gate": "sigmoid"}, RetrofitError, 'gate="sigmoid"'),
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
        ({"ratio": 8}, TypeError, "ratio"),
    ],
)
def test_options_that_make_no_sense(
    call: Callable[..., Any], options: dict[str, Any], error: type[Exception], fact: str
) -> None:
    _refused(call, _network(), error, fact, **options)


def test_remove_se_and_plan_of_without_a_retrofit() -> None:
    assert issubclass(RetrofitError, ValueError)
    model = nn.Sequential(_network(), SEAttention(4, 2))  # an SE of the user's own is none of ours
    assert not has_se(model)
    for verb in (remove_se, plan_of):
        _refused(verb, model, RetrofitError, "no SE inserted by add_se")


def test_a_model_with_lazy_parameters() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for call in VERBS.values():
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
    _refused(InsertSE(), _network(), TypeError, r"Sequential.*add_se")
    _refused(InsertSE(reduction=0), torch.fx.symbolic_trace(_network()), RetrofitError, "reduction")


# Faults of the package ---------------------------


def _broken(error: BaseException) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "where", ["retrofit.planned", "surgery.splice.carry.built", "surgery.splice.carry.apply_edits", "retrofit.strip"]
)
def test_a_fault_asks_to_be_reported(monkeypatch: pytest.MonkeyPatch, where: str, inplace: bool) -> None:
    model, error = _network(), TypeError("deep inside")
    call = partial(add_se, example_inputs=torch.zeros(1, 3, 9, 9))
    if where == "retrofit.strip":
        model, call = call(model), remove_se
    before = snapshot(model)
    monkeypatch.setattr(f"se_retrofit.{where}", _broken(error))
    with pytest.raises(RetrofitError, match="please report") as raised:
        call(model, inplace=inplace)
    assert raised.value.__cause__ is error
    assert_untouched(model, before)


@pytest.mark.parametrize("call", [plan_se, InsertSE()])
def test_so_it_is_in_planning_and_in_the_pass(monkeypatch: pytest.MonkeyPatch, call: Callable[[Any], Any]) -> None:
    traced = torch.fx.symbolic_trace(_network())
    monkeypatch.setattr("se_retrofit.retrofit.planned", _broken(KeyError("block")))
    with pytest.raises(RetrofitError, match="please report"):
        call(traced)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        RetrofitError("with a reason"),
        torch.OutOfMemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 256000000000 bytes."),
        UserWarning("a warning that the user has made an error"),
    ],
)
def test_interruptions_and_reasons_pass_as_they_are(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr("se_retrofit.surgery.splice.carry.apply_edits", _broken(error))
    with pytest.raises(type(error)) as raised:
        add_se(_network(), example_inputs=torch.zeros(1, 3, 9, 9))
    assert raised.value is error


def test_a_network_that_answers_to_every_name_is_not_taken_for_a_wrapped_one() -> None:
    class Answering(ResNet):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return None

    assert has_se(add_se(Answering(BasicBlock, [1, 1, 1, 1])))
