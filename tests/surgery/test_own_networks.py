"""Networks that a user wrote, with the things that users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    assert_same_function,
    gradients,
    randomised,
    run,
    se_modules,
)
from own_networks import CONVS, Branch, SmallResNet, Unit, check
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, plan_of, plan_se, remove_se

# Four kinds of network ---------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_small_residual_network_in_one_two_and_three_dims(dims: int) -> None:
    x, other = torch.randn(2, 3, *(9,) * dims), torch.randn(3, 3, *range(6, 6 + dims))
    check(SmallResNet(dims), x, blocks={"units.0", "units.1"}, more=(other,))
    check(SmallResNet(dims), x, blocks={"units.0", "units.1"}, example_inputs=other)


class Double(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, with two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Double(1, 8), Double(8, 16), Double(16, 32)
        self.up2, self.fuse2 = nn.ConvTranspose2d(32, 16, 2, 2), Double(32, 16)
        self.up1, self.fuse1 = nn.ConvTranspose2d(16, 8, 2, 2), Double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.fuse2(torch.cat([b, self.up2(c)], 1))
        return self.out(self.fuse1(torch.cat([a, self.up1(b)], 1)))


def test_a_u_net() -> None:
    retrofitted = check(UNet(), torch.randn(2, 1, 16, 16), more=(torch.randn(1, 1, 32, 24),))
    for part in ("down1", "down2", "bottom", "fuse2", "fuse1"):
        assert se_modules(retrofitted.get_submodule(part)), part


class Chain(nn.Module):
    """A plain chain that flattens its features, and so takes inputs of one size only."""

    def __init__(self, dims: int, size: int) -> None:
        super().__init__()
        self.conv1 = CONVS[dims](2, 8, 3, padding=1)
        self.conv2 = CONVS[dims](8, 8, 3, padding=1)
        self.head = nn.Linear(8 * size**dims, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.head(x.flatten(1))


@pytest.mark.parametrize(("dims", "size"), [(1, 64), (2, 28), (3, 16)])
def test_a_plain_chain_that_takes_one_usual_size_needs_no_example(dims: int, size: int) -> None:
    retrofitted = check(Chain(dims, size), torch.randn(2, 2, *(size,) * dims))
    assert len(se_modules(retrofitted)) == 2


@pytest.mark.parametrize(("dims", "size"), [(1, 77), (2, 13), (3, 5)])
def test_one_that_takes_an_unusual_size_says_so_and_works_with_an_example(dims: int, size: int) -> None:
    x = torch.randn(2, 2, *(size,) * dims)
    with pytest.raises(RetrofitError, match=r"Chain can't be run on any input that was tried; give .*example_inputs"):
        add_se(Chain(dims, size))
    assert len(se_modules(check(Chain(dims, size), x, example_inputs=x))) == 2


def test_a_network_of_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unit = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), Unit(8)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.unit(self.a(left) + self.b(right))

    check(Two(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), blocks={"unit"})


# Sharing and disguises ---------------------------


def test_tied_modules_stay_tied() -> None:
    """One unit at two places, and one conv in two units."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.a, self.b = Unit(8), Unit(8)
            self.again = self.a
            self.b.conv1 = self.a.conv1

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.again(self.a(self.stem(x))))

    retrofitted = check(Tied(), torch.randn(2, 3, 8, 8))
    assert retrofitted.again is retrofitted.a
    assert retrofitted.b.conv1 is retrofitted.a.conv1
    assert len(list(se_modules(retrofitted))) == 2
    calls = []
    retrofitted.a.se_attention.register_forward_hook(lambda *_: calls.append(1))
    retrofitted(torch.randn(1, 3, 8, 8))
    assert len(calls) == 2  # shared among the calls, as the unit is


def test_a_unit_called_with_other_widths_is_left_out_with_the_reason() -> None:
    class Loose(nn.Module):
        """Depthwise by its input, whatever the width."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 1, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(F.conv2d(x, self.weight.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.loose, self.wide, self.unit = nn.Conv2d(3, 8, 1), Loose(), nn.Conv2d(8, 16, 1), Unit(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.unit(self.loose(self.wide(self.loose(self.stem(x)))))

    model = Two().eval()
    plan = plan_se(model)
    assert [site.block for site in plan.sites] == ["unit"]
    assert "loose" in {skip.block for skip in plan.skipped}
    assert_same_function(add_se(model), model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "normalise",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=["weight_norm", "spectral_norm"],
)
def test_parametrized_convs(normalise: Callable[[nn.Module], nn.Module]) -> None:
    model = SmallResNet()
    for unit in model.units:
        unit.conv1, unit.conv2 = normalise(unit.conv1), normalise(unit.conv2)
    model = randomised(model).eval()
    retrofitted = add_se(model, 2)
    x = torch.randn(2, 3, 9, 9)
    assert len(se_modules(retrofitted)) == 2
    assert_same_function(retrofitted, model, x)
    ours, theirs = gradients(retrofitted.train(), x), gradients(model.train(), x)
    assert all(torch.equal(ours[name], g) for name, g in theirs.items() if g is not None)  # type: ignore[arg-type]
    assert list(remove_se(retrofitted).state_dict()) == list(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_the_old_weight_norm(inplace: bool) -> None:
    def normed() -> nn.Module:
        torch.manual_seed(3)
        model = SmallResNet()
        for unit in model.units:
            nn.utils.weight_norm(unit.conv1)
        return randomised(model).eval()

    model, reference = normed(), normed()
    retrofitted = add_se(model, 2, inplace=inplace)
    assert (retrofitted is model) == inplace
    assert len(se_modules(retrofitted)) == 2
    x = torch.randn(2, 3, 9, 9)
    assert_same_function(retrofitted, reference, x)
    ours, theirs = gradients(retrofitted, x), gradients(reference, x)
    assert all(torch.equal(ours[name], g) for name, g in theirs.items() if g is not None)  # type: ignore[arg-type]


def test_a_convolution_parametrized_after_the_retrofit() -> None:
    retrofitted = add_se(randomised(SmallResNet()).eval(), 2)
    x = torch.randn(2, 3, 9, 9)
    expected = run(retrofitted, x)
    for unit in retrofitted.units:
        nn.utils.parametrizations.weight_norm(unit.conv1)
    torch.testing.assert_close(run(retrofitted, x), expected)


def test_an_attribute_by_the_name_of_the_se_child_is_no_trouble() -> None:
    class Named(Branch):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.se_attention = nn.Identity()
            self.se = "taken"

        def forward(self, x: Tensor) -> Tensor:
            return x + self.se_attention(self.conv2(self.relu(self.conv1(x))))

    retrofitted = check(SmallResNet(unit=Named), torch.randn(2, 3, 9, 9))
    assert isinstance(retrofitted.units[0].se_attention, nn.Identity)
    assert {path.rpartition(".")[2] for path in se_modules(retrofitted)} == {"se_attention2"}


def test_sequentials_can_be_sliced_indexed_and_iterated_as_before() -> None:
    """The SE in a VGG-like `features` sits inside its elements' order, and the original keys stay."""
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
    )
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    retrofitted = check(model, torch.randn(2, 3, 16, 16))
    assert len(retrofitted) == 4
    assert list(retrofitted[0]._modules)[:6] == list(features._modules)
    assert all(isinstance(new, type(old)) for old, new in zip(features, retrofitted[0], strict=False))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        by_hand = x
        for element in retrofitted[0]:
            by_hand = element(by_hand)
        assert torch.equal(retrofitted[0][3:](retrofitted[0][:3](x)), by_hand)
        assert torch.equal(retrofitted[0](x), by_hand)


def test_a_frozen_network_and_its_frozen_blocks() -> None:
    model = SmallResNet().eval().requires_grad_(False)
    retrofitted = add_se(model, 2)
    trained = {name for name, p in retrofitted.named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.{name}" for path, se in se_modules(retrofitted).items() for name, _ in se.named_parameters()
    }
    assert len(trained) == 4


class Consuming(nn.Module):
    """Takes what it needs out of the containers that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x, mask = batch["features"].pop(), batch.pop("mask", None)
        x = x + self.body(x)
        return x if mask is None else x * mask


def test_each_run_gets_containers_of_its_own() -> None:
    x, mask = torch.randn(2, 8, 9, 9), torch.ones(2, 1, 9, 9)
    given = {"features": [x], "mask": mask}
    model = randomised(Consuming())
    retrofitted = add_se(model, example_inputs=(given,))
    assert given.keys() == {"features", "mask"}
    assert given["features"][0] is x
    for training in (False, True):
        got, wanted = (m.train(training)({"features": [x], "mask": mask}) for m in (retrofitted, model))
        assert torch.equal(got, wanted)
    assert [site.kind for site in plan_of(retrofitted).sites] == ["residual"]


class Scaled(nn.Module):
    """The layer scale of the original ConvNeXt: before the permutation back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(1e-6 * torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(torch.nn.functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def test_se_goes_before_a_layer_scale_that_stands_before_a_permutation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Scaled(), Scaled())
    assert [(site.after, site.channel_dim) for site in plan_se(model).sites] == [("down", -1)] * 2
    check(model, torch.randn(2, 3, 16, 16))
