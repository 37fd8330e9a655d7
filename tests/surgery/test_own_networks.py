"""Networks that a user wrote, with the things that users write."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from block_networks import ReLUFirst, Styled
from networks import PLACEMENTS, assert_same_function, randomise_se, randomised, run, se_modules
from numeric import check_promises
from structure import Net, Unit, conv, convs, module_of
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, plan_se

X = torch.randn(2, 3, 9, 9)


def chain(dims: int, size: int) -> nn.Module:
    """A plain chain that flattens its features, and so takes inputs of one size only."""
    layers = (conv(2, 8, dims=dims), nn.ReLU(), conv(8, 8, dims=dims), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * size**dims, 3))


@pytest.mark.parametrize(("dims", "size"), [(1, 64), (2, 28), (3, 16)])
def test_a_network_that_takes_one_usual_size_needs_no_example(dims: int, size: int) -> None:
    assert len(plan_se(chain(dims, size)).sites) == 2


@pytest.mark.parametrize(("dims", "size"), [(1, 77), (2, 13), (3, 5)])
def test_one_that_takes_an_unusual_size_says_so_and_works_with_an_example(dims: int, size: int) -> None:
    with pytest.raises(RetrofitError, match=r"Sequential .*example_inputs"):
        add_se(chain(dims, size))
    assert len(plan_se(chain(dims, size), example_inputs=torch.zeros(2, 2, *(size,) * dims)).sites) == 2


def test_tied_modules_stay_tied() -> None:
    """One unit at two places, and one conv in two units."""
    model = nn.Sequential(conv(3, 8), Unit(), Unit())
    model.append(model[1])
    model[2].conv1 = model[1].conv1
    retrofitted = check_promises(model, lambda net: net(X))
    assert retrofitted[3] is retrofitted[1]
    assert retrofitted[2].conv1 is retrofitted[1].conv1
    calls: list[str] = []
    for path, se in se_modules(retrofitted).items():
        se.register_forward_hook(lambda *_, path=path: calls.append(path))
    retrofitted(X)  # the unit's SE is shared among its calls, as the unit is
    assert calls == ["1.se_attention", "2.se_attention", "1.se_attention"]


@module_of(lambda: {"stem": conv(3, 8), "convs": nn.ModuleList(conv(8, 8) for _ in range(3))})
def Weights(self, x: Tensor) -> Tensor:
    """Uses its convolutions' weights in one expression of a loop."""
    x = self.stem(x)
    for layer in self.convs:
        x = x + F.relu(F.conv2d(x, layer.weight, padding=1))
    return x


def test_blocks_of_a_loop_that_cannot_have_their_own_se_are_left_out_with_the_reason() -> None:
    with pytest.raises(RetrofitError, match="one expression of a loop"):
        plan_se(Weights())
    skipped = plan_se(nn.Sequential(Weights(), Unit())).skipped
    assert {s.block for s in skipped if "one expression" in s.reason} == {f"0.convs.{i}" for i in range(3)}


@module_of(lambda: {"weight": nn.Parameter(torch.randn(1, 1, 3, 3))})
def Loose(self, x: Tensor) -> Tensor:
    """Depthwise by its input, whatever the width."""
    return x + torch.relu(F.conv2d(x, self.weight.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1]))


def test_a_unit_called_with_other_widths_is_left_out_with_the_reason() -> None:
    loose = Loose()
    model = nn.Sequential(conv(3, 8, 1), loose, conv(8, 16, 1), loose, Unit(16)).eval()
    plan = plan_se(model)
    assert [site.block for site in plan.sites] == ["4"]
    assert "1" in {skip.block for skip in plan.skipped}
    assert_same_function(add_se(model), model, X)


def test_a_convolution_parametrized_after_the_retrofit() -> None:
    retrofitted = randomise_se(add_se(randomised(nn.Sequential(conv(3, 8), Unit())).eval(), 2))
    expected = run(retrofitted, X)
    nn.utils.parametrizations.weight_norm(retrofitted[1].conv1)
    torch.testing.assert_close(run(retrofitted, X), expected)


def test_an_attribute_by_the_name_of_the_se_child_is_no_trouble() -> None:
    @module_of(lambda: {"se_attention": nn.Identity(), "se": "taken"}, Unit)
    def Named(self, x: Tensor) -> Tensor:
        return x + self.se_attention(self.conv2(self.conv1(x).relu()))

    retrofitted = check_promises(nn.Sequential(conv(3, 8), Named()), lambda net: net(X))
    assert isinstance(retrofitted[1].se_attention, nn.Identity)
    assert list(se_modules(retrofitted)) == ["1.se_attention2"]


def test_sequentials_can_be_sliced_indexed_and_iterated_as_before() -> None:
    """The SE in a VGG-like `features` sits inside its elements' order, and the original keys stay."""
    features = nn.Sequential(conv(3, 8), nn.ReLU(inplace=True), nn.MaxPool2d(2), *convs(8, 8))
    model = randomised(nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))).eval()
    retrofitted = randomise_se(add_se(model))
    assert len(retrofitted) == 4
    assert list(retrofitted[0]._modules)[:6] == list(features._modules)
    assert all(isinstance(new, type(old)) for old, new in zip(features, retrofitted[0], strict=False))
    by_hand = X
    for element in retrofitted[0]:
        by_hand = element(by_hand)
    assert torch.equal(retrofitted[0][3:](retrofitted[0][:3](X)), by_hand)
    assert torch.equal(retrofitted[0](X), by_hand)
    assert not torch.equal(features(X), by_hand)


@module_of(dict, Unit)
def PreActivated(self, x: Tensor) -> Tensor:
    """An in-place ReLU comes first in the branch, and so changes what the skip sees."""
    out = self.norm1(self.conv1(F.relu_(x))).relu()
    out = self.conv2(out)
    out += x
    return out


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_works_with_an_in_place_relu_first_in_the_branch(placement: str) -> None:
    check_promises(nn.Sequential(conv(3, 8), PreActivated()), lambda net: net(X), placement=placement)


def test_a_skip_that_is_overwritten_within_the_branch_has_a_place_only_behind_that() -> None:
    @module_of(dict, ReLUFirst)
    def BranchFirst(self, x: Tensor) -> Tensor:
        return self.body(x) + x

    check_promises(nn.Sequential(conv(3, 8), BranchFirst()), lambda net: net(X), placement="identity")
    with pytest.raises(RetrofitError, match=r"1: .*overwritten in place"):
        add_se(nn.Sequential(conv(3, 8), ReLUFirst()), placement="identity")


def test_where_the_batch_is_folded_into_the_channels_there_is_no_place() -> None:
    model = Net(Styled)
    for placement in ("pre", "identity", "post"):
        check_promises(model, lambda net: net(X.clone()), placement=placement)
    with pytest.raises(RetrofitError, match="which dim"):
        add_se(model, placement="3x3")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_example_may_be_of_another_size_than_what_comes_later(dims: int) -> None:
    model = nn.Sequential(conv(3, 8, dims=dims), Unit(dims=dims))
    example, x = torch.randn(3, 3, *range(6, 6 + dims)), torch.randn(2, 3, *(9,) * dims)
    check_promises(model, lambda net: net(x), example_inputs=example)
