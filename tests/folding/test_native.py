"""Retrofitted SE in the native form of other libraries, and back, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from constant_gates import relative
from networks import NETWORKS, assert_untouched, random_states, randomise_se, randomised, se_modules, snapshot
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

PAIRS = {
    "resnet18": {"reduction": 16, "min_hidden": 8},
    "resnet34": {"reduction": 16, "min_hidden": 8},
    "resnet50": {"reduction": 16, "min_hidden": 8},
    "resnext50_32x4d": {"reduction": 16, "min_hidden": 8},
    "resnet33ts": {"reduction": 16, "min_hidden": 8, "placement": "3x3"},  # SiLU follows: the factor goes forwards
}


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def retrofitted(name: str, **options: object) -> nn.Module:
    bare = randomised(timm.create_model(name, num_classes=10)).double().eval()
    settings = {**PAIRS[name], "example_inputs": images(), **options}
    return randomise_se(add_se(bare, **settings))


def native(name: str) -> nn.Module:
    return randomised(timm.create_model(f"se{name}", num_classes=10), seed=5).double().eval()


SLOW = ("resnet33ts", "resnet18", "resnet34", "resnet50", "resnext50_32x4d")


@pytest.mark.parametrize("name", swept([name for name in PAIRS if name not in SLOW], SLOW))
def test_a_retrofitted_network_fills_timms_native_one_and_back(name: str) -> None:
    model, target = retrofitted(name, bias=True), native(name)
    filled = to_native(model, target)
    assert list(filled.state_dict()) == list(target.state_dict())
    assert type(filled) is type(target)
    x = images(96)
    assert relative(filled(x), model(x)) < 1e-12
    assert relative(target(x), model(x)) > 1e-3
    back = from_native(retrofitted(name, bias=True), target)
    assert relative(back(x), target(x)) < 1e-12


def test_there_and_back_is_exact() -> None:
    model, target = own_retrofitted(bias=True), own(lambda width: NativeUnit(width, bias=True))
    again = from_native(model, to_native(model, target))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", swept(["torchvision/squeezenet1_1"], ["timm/mobilenetv2_100"]))
def test_twice_the_sigmoid_becomes_the_plain_sigmoid_by_powers_of_two(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    original = network.build().double()
    model = randomise_se(add_se(original))
    plain = to_native(model)
    assert "TwiceSigmoid" not in str(plain)
    assert {se.gate for se in se_modules(plain).values()} == {plan_of(plain).options["gate"]} == {"sigmoid"}
    assert relative(plain(network.input().double()), model(network.input().double())) < 1e-12
    loaded = load_retrofitted(save_retrofitted(plain, tmp_path / "saved"))
    assert torch.equal(loaded(network.input().double()), plain(network.input().double()))
    powers = set()
    for key, value in model.state_dict().items():
        ratio = plain.state_dict()[key][value != 0] / value[value != 0]
        powers |= set(ratio.unique().tolist())
    assert powers == {0.5, 1.0, 2.0} if name != "timm/mobilenetv2_100" else powers == {1.0, 2.0}


# Networks of a user ---------------------------


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))

    def branch(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class NativeUnit(Unit):
    """Attention in Linear layers, written out."""

    gate = staticmethod(torch.sigmoid)

    def __init__(self, width: int, hidden: int = 4, bias: bool = False) -> None:
        super().__init__(width)
        self.down, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def branch(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        gate = self.gate(self.up(torch.relu(self.down(y.mean((2, 3))))))
        return y * gate[:, :, None, None]


class OtherUnit(NativeUnit):
    gate = staticmethod(nn.functional.hardsigmoid)


def own(unit: Callable[[int], nn.Module], width: int = 16, units: int = 2) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3), *(unit(width) for _ in range(units))]
    return (
        randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))).double().eval()
    )


def own_retrofitted(**options: object) -> nn.Module:
    return randomise_se(add_se(own(Unit), example_inputs=images(), **options))


def test_a_users_native_network_is_filled_and_read() -> None:
    model, target = own_retrofitted(), own(NativeUnit)
    assert relative(to_native(model, target)(images()), model(images())) < 1e-12
    assert relative(from_native(model, target)(images()), target(images())) < 1e-12
    plain = own_retrofitted(gate="sigmoid")
    assert relative(from_native(plain, target)(images()), target(images())) < 1e-12
    assert relative(to_native(plain, target)(images()), plain(images())) < 1e-12


@pytest.mark.sweep
def test_torchvisions_bottlenecks_fill_timms() -> None:
    bare = randomised(torchvision.models.resnet50(num_classes=10)).double().eval()
    model = randomise_se(add_se(bare, reduction=16, min_hidden=8, example_inputs=images()))
    assert relative(to_native(model, native("resnet50"))(images()), model(images())) < 1e-12


# What does not fit ---------------------------


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (lambda: own(Unit), "no channel gate"),
        (lambda: own(OtherUnit), "gate at 1 is not the sigmoid .* it has hardsigmoid where sigmoid is expected"),
        (lambda: own(lambda w: NativeUnit(w, 8)), "gate at 1.se_attention .*hidden 4.* hidden 8"),
        (lambda: own(NativeUnit, 24), r"part 1 in the order of execution is 0 \(Conv2d, \(16, 3, 3, 3\)"),
        (lambda: own(NativeUnit, units=3), r"part 8 "),
        (lambda: own_retrofitted(), "retrofitted by add_se"),
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


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(RetrofitError, match="takes a retrofitted network"):
        to_native(own(Unit))
    with pytest.raises(RetrofitError, match="is a factor for each of 16 channels, not SE"):
        to_native(own_retrofitted(attention="static"))
    with pytest.raises(TypeError, match="native network as a"):
        from_native(own_retrofitted(), "seresnet50")  # type: ignore[arg-type]
    with pytest.raises(RetrofitError, match="retrofit with bias=True"):
        from_native(retrofitted("resnet18"), native("resnet18"))
    folded = fold_se(own_retrofitted(), [images()], tolerance=100)
    with pytest.raises(RetrofitError, match="takes a retrofitted network"):
        to_native(folded)


def test_a_factor_that_nothing_can_take_is_an_error_that_names_the_site() -> None:
    model = add_se(own(Unit), example_inputs=images(), placement="post", include="1")
    with pytest.raises(RetrofitError, match=r"gate at 1.se_attention can't be moved"):
        to_native(model)


def test_the_networks_and_the_random_states_are_untouched() -> None:
    model, target = own_retrofitted(), own(NativeUnit)
    before, of_target, states = snapshot(model), snapshot(target), list(random_states())
    to_native(model, target)
    from_native(model, target)
    assert_untouched(model, before)
    assert_untouched(target, of_target)
    assert list(random_states()) == states
