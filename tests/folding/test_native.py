"""Retrofitted SE in the native form of other libraries, and back, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from networks import NETWORKS, assert_untouched, random_states, randomise_se, randomised, se_modules, snapshot
from own_networks import Unit, conv, images, own, relative
from sweeps import swept
from torch import Tensor, nn

from se_retrofit import (
    RetrofitError,
    add_se,
    fold_se,
    from_native,
    load_retrofitted,
    plan_of,
    save_retrofitted,
    to_native,
)
from se_retrofit.folding import fold, measuring
from se_retrofit.folding import native as native_form
from se_retrofit.folding.measuring import relative_change

PAIRS: dict[str, dict[str, str]] = {
    "resnet18": {},
    "resnet34": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "resnet33ts": {"placement": "3x3"},  # SiLU follows: the factor goes forwards
}
X = images(2, 64)


def retrofitted(name: str, **options: object) -> nn.Module:
    bare = randomised(timm.create_model(name, num_classes=10)).double().eval()
    return randomise_se(add_se(bare, 16, min_hidden=8, example_inputs=X, **options))


def native(name: str) -> nn.Module:
    return randomised(timm.create_model(f"se{name}", num_classes=10), seed=5).double().eval()


@pytest.mark.sweep
@pytest.mark.parametrize("name", PAIRS)
def test_a_retrofitted_network_fills_timms_native_one_and_back(name: str) -> None:
    model, target = retrofitted(name, bias=True, **PAIRS[name]), native(name)
    filled = to_native(model, target)
    assert list(filled.state_dict()) == list(target.state_dict())
    assert type(filled) is type(target)
    x = images(2, 96)
    assert relative(filled(x), model(x)) < 1e-12
    assert relative(target(x), model(x)) > 1e-3
    back = from_native(retrofitted(name, bias=True, **PAIRS[name]), target)
    assert relative(back(x), target(x)) < 1e-12


@pytest.mark.parametrize("name", swept(["torchvision/squeezenet1_1"], ["timm/mobilenetv2_100"]))
def test_twice_the_sigmoid_becomes_the_plain_sigmoid_by_powers_of_two(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model, x = randomise_se(add_se(network.build().double())), network.input().double()
    plain = to_native(model)
    assert "TwiceSigmoid" not in str(plain)
    assert {se.gate for se in se_modules(plain).values()} == {plan_of(plain).options["gate"]} == {"sigmoid"}
    assert relative(plain(x), model(x)) < 1e-12
    loaded = load_retrofitted(save_retrofitted(plain, tmp_path / "saved"))
    assert torch.equal(loaded(x), plain(x))
    powers = set()
    for key, value in model.state_dict().items():
        ratio = plain.state_dict()[key][value != 0] / value[value != 0]
        powers |= set(ratio.unique().tolist())
    assert powers == {0.5, 1.0, 2.0} if name != "timm/mobilenetv2_100" else powers == {1.0, 2.0}


# Networks of a user ---------------------------


class NativeUnit(Unit):
    """Attention in Linear layers, written out."""

    gate = staticmethod(torch.sigmoid)

    def __init__(self, width: int, hidden: int = 4, bias: bool = False) -> None:
        super().__init__(conv(width), nn.BatchNorm2d(width), nn.ReLU())
        self.down, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def branch(self, x: Tensor) -> Tensor:
        y = super().branch(x)
        gate = self.gate(self.up(torch.relu(self.down(y.mean((2, 3))))))
        return y * gate[:, :, None, None]


class OtherUnit(NativeUnit):
    gate = staticmethod(nn.functional.hardsigmoid)


def bare() -> nn.Module:
    return own(*(Unit(conv(16), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(2)), width=16)


def own_retrofitted(**options: object) -> nn.Module:
    return randomise_se(add_se(bare(), example_inputs=X, **options))


def own_native(cls: type[NativeUnit] = NativeUnit, width: int = 16, units: int = 2, **options: int) -> nn.Module:
    return own(*(cls(width, **options) for _ in range(units)), width=width)


def test_outputs_are_compared_in_full_precision_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In TF32, the outputs of equal networks differ by more than what is tolerated."""
    seen: set[str] = set()

    def noted(*outputs: list[Tensor]) -> float:
        seen.update((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        return relative_change(*outputs)

    for module in (fold, measuring, native_form):
        monkeypatch.setattr(module, "relative_change", noted)
    model = own_retrofitted()
    for convert in (to_native, lambda net: fold_se(net, [X])):
        seen.clear()
        convert(model)
        assert seen == {"ieee"}


@pytest.mark.parametrize("gate", ["identity", "sigmoid"])
def test_a_users_native_network_is_filled_and_read_and_nothing_else_changes(gate: str) -> None:
    model, target = own_retrofitted(gate=gate), own_native()
    before, of_target, states = snapshot(model), snapshot(target), list(random_states())
    assert relative(to_native(model, target)(X), model(X)) < 1e-12
    assert relative(from_native(model, target)(X), target(X)) < 1e-12
    assert_untouched(model, before)
    assert_untouched(target, of_target)
    assert list(random_states()) == states


def test_there_and_back_is_exact() -> None:
    model = own_retrofitted(bias=True)
    again = from_native(model, to_native(model, own_native(bias=True)))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.sweep
def test_torchvisions_bottlenecks_fill_timms() -> None:
    bare = randomised(torchvision.models.resnet50(num_classes=10)).double().eval()
    model = randomise_se(add_se(bare, reduction=16, min_hidden=8, example_inputs=X))
    assert relative(to_native(model, native("resnet50"))(X), model(X)) < 1e-12


# What does not fit ---------------------------


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (bare, "no channel gate"),
        (lambda: own_native(OtherUnit), "gate at 1 is not the sigmoid .* it has hardsigmoid where sigmoid is expected"),
        (lambda: own_native(hidden=8), "gate at 1.se_attention .*hidden 4.* hidden 8"),
        (lambda: own_native(width=24), r"part 1 in the order of execution is 0 \(Conv2d, \(16, 3, 3, 3\)"),
        (lambda: own_native(units=3), r"part 8 "),
        (own_retrofitted, "retrofitted by add_se"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_with_the_site(target: Callable[[], nn.Module], says: str) -> None:
    model, given = own_retrofitted(), target()
    before, of_target = snapshot(model), snapshot(given)
    for function in (to_native, from_native):
        with pytest.raises(RetrofitError, match=says):
            function(model, given)
    assert_untouched(model, before)
    assert_untouched(given, of_target)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (bare, "takes a retrofitted network"),
        (lambda: fold_se(own_retrofitted(), [X], tolerance=100), "takes a retrofitted network"),
        (lambda: own_retrofitted(attention="static"), "is a factor for each of 16 channels, not SE"),
        # nothing can take the factor
        (lambda: own_retrofitted(placement="post", include="1"), "gate at 1.se_attention can't be moved"),
    ],
)
def test_what_has_no_native_form_is_refused_with_the_reason(model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(RetrofitError, match=says):
        to_native(model())


def test_what_cannot_be_read_from_a_native_network_is_refused() -> None:
    with pytest.raises(RetrofitError, match="retrofit with bias=True"):
        from_native(own_retrofitted(), own_native(bias=True))
    with pytest.raises(TypeError, match=r"the native network must be an nn.Module"):
        from_native(own_retrofitted(), "seresnet50")  # type: ignore[arg-type]
