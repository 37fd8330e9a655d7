"""Networks that a user wrote, with the things that users write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    assert_same_function,
    assert_untouched,
    gradients,
    randomise_se,
    randomised,
    run,
    same_tensors,
    se_modules,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from se_retrofit import RetrofitError, add_se, has_se, plan_se, remove_se


def _check(
    model: nn.Module, *inputs: Any, blocks: set[str] | None = None, more: tuple[Any, ...] = (), **options: Any
) -> nn.Module:
    """Retrofit a model; same outputs and gradients in both modes, at ``inputs`` and at ``more``; live gates; undo.

    The inputs are given as example_inputs only where ``options`` say so.
    """
    model = randomised(model).eval()
    before = snapshot(model)
    retrofitted = add_se(model, 2, **options)
    assert_untouched(model, before)
    if blocks is not None:
        assert {site.block for site in plan_se(model, 2, **options).sites} == blocks
    for arguments in (inputs, *((x,) for x in more)):
        assert_same_function(retrofitted, model, *arguments)
    ours, theirs = copy.deepcopy(retrofitted).train(), copy.deepcopy(model).train()
    found, expected = gradients(ours, *inputs), gradients(theirs, *inputs)
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(other, gradient), name  # type: ignore[arg-type]
    for path in se_modules(retrofitted):
        gate = found[f"{path}.fc.2.weight"]
        assert gate is not None, path
        assert gate.abs().max() > 0, path
    assert same_tensors(run(ours, *inputs), run(theirs, *inputs))
    assert not same_tensors(run(randomise_se(copy.deepcopy(retrofitted)), *inputs), run(model, *inputs))
    removed = remove_se(retrofitted)
    assert [type(m) for m in removed.modules()] == [type(m) for m in model.modules()]
    assert list(removed.state_dict()) == list(model.state_dict())
    return retrofitted


# Four kinds of network ---------------------------

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Unit(nn.Module):
    """A residual unit with any number of spatial dims."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.conv1 = CONVS[dims](channels, channels, 3, padding=1)
        self.bn1 = NORMS[dims](channels)
        self.conv2 = CONVS[dims](channels, channels, 3, padding=1)
        self.bn2 = NORMS[dims](channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out)


class SmallResNet(nn.Module):
    def __init__(self, dims: int = 2, channels: int = 8, unit: Callable[..., nn.Module] = Unit) -> None:
        super().__init__()
        self.stem = CONVS[dims](3, channels, 3, padding=1)
        self.units = nn.ModuleList([unit(channels, dims) if unit is Unit else unit(channels) for _ in range(2)])
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
        return self.head(x.flatten(2).mean(-1))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_small_residual_network_in_one_two_and_three_dims(dims: int) -> None:
    x, other = torch.randn(2, 3, *(9,) * dims), torch.randn(3, 3, *range(6, 6 + dims))
    _check(SmallResNet(dims), x, blocks={"units.0", "units.1"}, more=(other,))
    _check(SmallResNet(dims), x, blocks={"units.0", "units.1"}, example_inputs=other)


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
    retrofitted = _check(UNet(), torch.randn(2, 1, 16, 16), more=(torch.randn(1, 1, 32, 24),))
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
    retrofitted = _check(Chain(dims, size), torch.randn(2, 2, *(size,) * dims))
    assert len(se_modules(retrofitted)) == 2


@pytest.mark.parametrize(("dims", "size"), [(1, 77), (2, 13), (3, 5)])
def test_one_that_takes_an_unusual_size_says_so_and_works_with_an_example(dims: int, size: int) -> None:
    x = torch.randn(2, 2, *(size,) * dims)
    with pytest.raises(RetrofitError, match=r"Chain can't be run on any input that was tried; give .*example_inputs"):
        add_se(Chain(dims, size))
    assert len(se_modules(_check(Chain(dims, size), x, example_inputs=x))) == 2


def test_a_network_of_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unit = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), Unit(8)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.unit(self.a(left) + self.b(right))

    _check(Two(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), blocks={"unit"})


# What blocks do ---------------------------


class Branch(nn.Module):
    """The layers that the blocks below share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)


class SharedReLU(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class InPlace(Branch):
    """In-place operations wherever they may stand, right before and right behind the place of SE."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.conv1(x))
        out = self.conv2(out).mul_(0.5)
        out.add_(x)
        out.mul_(2.0)
        out -= 0.1
        return self.relu(out)


class Functional(Branch):
    """No module is called: weights go into functions."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1))
        out = F.conv2d(out, self.conv2.weight, padding=(1, 1))
        return F.relu(torch.add(x, out))


class Keywords(Branch):
    def forward(self, x: Tensor, *, scale: float = 0.5, flip: bool = False) -> Tensor:
        out = self.conv2(self.relu(self.conv1(input=x)))
        if flip:
            out = -out
        return x + out * scale


class ChannelsLast(nn.Module):
    """ConvNeXt's way: (N, H, W, C) within the block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x).permute(0, 2, 3, 1))
        out = self.down(F.gelu(self.up(out)))
        return x + out.permute(0, 3, 1, 2)


class Checkpointed(Branch):
    """Recomputes its branch in the backward pass while it is trained."""

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.branch, x, use_reentrant=False) if self.training else self.branch(x)
        return F.relu(x + out)


class InnerCheckpoint(Branch):
    """Its branch is a module, which goes through a checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.branch = nn.Sequential(self.conv1, nn.ReLU(), self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + checkpoint(self.branch, x, use_reentrant=False))


class Dropping(Branch):
    """Dropout by hand, with the block's own training flag."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.dropout(self.relu(self.conv1(x)), 0.3, training=self.training)
        out = self.conv2(out)
        if self.training:
            out = F.dropout2d(out, 0.2, self.training)
        return F.relu(x + out)


class Listed(Branch):
    """Takes a list and gives a list."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        x = torch.cat(features, 1)
        out = x + self.conv2(self.relu(self.conv1(x)))
        return list(out.chunk(len(features), 1))


class Splitting(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = Listed(channels)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.block(list(x.chunk(2, 1)))
        return torch.cat([right, left], 1)


class Reshaping(Branch):
    """Computes with the sizes of its input, which have to stay symbolic."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        out = self.relu(self.conv1(x))
        out = out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        out = F.interpolate(self.conv2(out[:, :, ::2, ::2]), size=(h, w))
        return x + out * (1.0 / (h * w))


class Wrapped(Branch):
    """A decorated forward with no-grad within it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean((2, 3), keepdim=True)
        out = self.conv2(self.relu(self.conv1(x - mean)))
        return x + out


BLOCKS = [SharedReLU, InPlace, Functional, Keywords, ChannelsLast, Dropping, Splitting, Reshaping]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_what_blocks_do(block: type[nn.Module]) -> None:
    inner = ".block" if block is Splitting else ""
    _check(
        SmallResNet(unit=block), torch.randn(2, 3, 9, 9), blocks={f"units.0{inner}", f"units.1{inner}"},
        more=(torch.randn(1, 3, 12, 7), torch.randn(5, 3, 9, 9)),
    )  # fmt: skip


@pytest.mark.parametrize("block", [Checkpointed, InnerCheckpoint, Wrapped], ids=lambda block: block.__name__)
def test_contexts_within_a_block_are_kept_or_the_block_is_left_out_with_the_reason(block: type[nn.Module]) -> None:
    """A graph can't show a checkpoint or a change of the grad mode: nothing may be lost silently."""
    model = randomised(SmallResNet(unit=block)).eval()
    model.units.append(Unit(8))
    plan = plan_se(model, 2)
    assert {site.block for site in plan.sites} | {skip.block for skip in plan.skipped} == {
        "units.0",
        "units.1",
        "units.2",
    }
    assert "units.2" in {site.block for site in plan.sites}
    for skip in plan.skipped:
        assert "checkpoint" in skip.reason or "grad mode" in skip.reason
    retrofitted = add_se(model, 2)
    x = torch.randn(2, 3, 9, 9)
    assert_same_function(retrofitted, model, x)
    ours, theirs = gradients(retrofitted.train(), x), gradients(model.train(), x)
    for name, gradient in theirs.items():
        assert torch.equal(ours[name], gradient), name  # type: ignore[arg-type]


def test_keyword_arguments_keep_their_names_and_their_defaults() -> None:
    model = SmallResNet(unit=Keywords).eval()
    retrofitted = add_se(model, 2)
    x = torch.randn(2, 8, 5, 5)
    block, original = retrofitted.units[0], model.units[0]
    with torch.no_grad():
        assert torch.equal(block(x=x), original(x=x))
        assert torch.equal(block(x, scale=0.5, flip=False), original(x))
        for options in ({"scale": 2.0}, {"flip": True}):
            _same_or_loud(block, original, x, **options)
        with pytest.raises(TypeError):
            block(x, 2.0)


# Control flow ---------------------------


def _same_or_loud(block: nn.Module, original: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """The block computes what the original does, or raises a RetrofitError: True in the first case."""
    expected = run(original, *args, **kwargs)
    try:
        found = run(block, *args, **kwargs)
    except RetrofitError as error:
        reason = str(error)
    else:
        assert same_tensors(found, expected)
        return True
    assert "remove_se" in reason
    return False


class OptionalTensor(Branch):
    """A second input that may be None."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        if other is None:
            other = x
        return other + out


class BothWays(nn.Module):
    """Calls its blocks with and without the second input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second, self.third = (OptionalTensor(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.second(y, x)
        return self.third(self.third(y), other=x)


def test_optional_tensor_arguments_are_taken_either_way() -> None:
    prefix = {f"units.{i}.{name}" for i in range(2) for name in ("first", "second", "third")}
    retrofitted = _check(SmallResNet(unit=BothWays), torch.randn(2, 3, 9, 9), blocks=prefix)
    x, other = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    original = remove_se(retrofitted)
    for name in ("first", "second", "third"):
        block, plain = getattr(retrofitted.units[0], name), getattr(original.units[0], name)
        taken = [
            _same_or_loud(block, plain, x),
            _same_or_loud(block, plain, x, other),
            _same_or_loud(block, plain, x, other=other),
        ]
        assert any(taken)
        assert name != "third" or all(taken)


class ByShape(Branch):
    """Another computation for small inputs, odd inputs and single ones."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.conv1(x))
        if x.shape[-1] > 8:
            out = self.conv2(out)
        if x.size(2) % 2:
            out = out * 0.5
        if len(x) == 1:
            out = -out
        return x + out


class ByCount(nn.Module):
    """As many layers as the input has rows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for _ in range(x.shape[2] // 4):
            out = torch.relu(self.conv(out))
        return x + out


class ByTensor(Branch):
    """A branch on a number of dims and on a dtype."""

    def forward(self, x: Tensor) -> Tensor:
        single = x.dim() == 3
        if single:
            x = x[None]
        out = self.conv2(self.relu(self.conv1(x)))
        if x.dtype == torch.float64:
            out = out * 2
        x = x + out
        return x[0] if single else x


@pytest.mark.parametrize("block", [ByShape, ByCount, ByTensor], ids=lambda block: block.__name__)
def test_control_flow_is_followed_or_fails_loudly(block: type[nn.Module]) -> None:
    model = randomised(SmallResNet(unit=block)).eval()
    example = torch.randn(2, 3, 10, 10)
    retrofitted = add_se(model, 2, example_inputs=example)
    assert len(se_modules(retrofitted)) == 2
    assert_same_function(retrofitted, model, example)
    for shape in ((2, 3, 12, 12), (2, 3, 9, 10), (2, 3, 10, 7), (1, 3, 10, 10), (3, 3, 4, 4), (2, 3, 24, 24)):
        _same_or_loud(retrofitted, model, torch.randn(shape))
    inner = torch.randn(8, 10, 10)
    if block is ByTensor:
        _same_or_loud(retrofitted.units[0], model.units[0], inner)
    _same_or_loud(copy.deepcopy(retrofitted).double(), copy.deepcopy(model).double(), example.double())


class ByFlag(Branch):
    """Looks at attributes of its own that the user may change later."""

    halve = False

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.factor = 1.0
        self.skip = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.conv1(x))) * self.factor
        if self.halve:
            out = out / 2
        if not self.skip:
            return x + out + 1.0
        return x + out


@pytest.mark.parametrize(("name", "value"), [("factor", 3.0), ("skip", False), ("halve", True)])
def test_an_attribute_changed_after_the_retrofit_is_followed_or_fails_loudly(name: str, value: Any) -> None:
    model = randomised(SmallResNet(unit=ByFlag)).eval()
    retrofitted = add_se(model, 2)
    for m in (model, retrofitted):
        for unit in m.units:
            setattr(unit, name, value)
    _same_or_loud(retrofitted, model, torch.randn(2, 3, 9, 9))
    assert has_se(retrofitted)


@pytest.mark.parametrize("replacement", ["conv2", "relu"])
def test_a_child_replaced_after_the_retrofit_is_called(replacement: str) -> None:
    model = randomised(SmallResNet(unit=SharedReLU)).eval()
    retrofitted = add_se(model, 2)
    new: nn.Module = nn.Tanh() if replacement == "relu" else nn.Conv2d(8, 8, 1)
    for m in (model, retrofitted):
        setattr(m.units[1], replacement, new)
    _same_or_loud(retrofitted, model, torch.randn(2, 3, 9, 9))


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

    retrofitted = _check(Tied(), torch.randn(2, 3, 8, 8))
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
def test_the_old_weight_norm_cannot_be_copied_but_retrofitted_in_place() -> None:
    def normed() -> nn.Module:
        torch.manual_seed(3)
        model = SmallResNet()
        for unit in model.units:
            nn.utils.weight_norm(unit.conv1)
        return randomised(model).eval()

    model, reference = normed(), normed()
    before = list(model.state_dict())
    with pytest.raises(RetrofitError, match=r"can't be copied.*inplace=True"):
        add_se(model, 2)
    assert list(model.state_dict()) == before
    retrofitted = add_se(model, 2, inplace=True)
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

    retrofitted = _check(SmallResNet(unit=Named), torch.randn(2, 3, 9, 9))
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
    retrofitted = _check(model, torch.randn(2, 3, 16, 16))
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


class Locals(nn.Module):
    """A forward with a nested function, a default that is a tuple, and star arguments."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, *rest: Tensor, pads: tuple[int, ...] = (0, 0), **named: Any) -> Tensor:
        def act(y: Tensor) -> Tensor:
            return F.relu(y)

        return x + act(self.conv(F.pad(x, pads)))


def test_star_arguments_and_defaults_that_are_tuples() -> None:
    model = randomised(SmallResNet(unit=Locals)).eval()
    retrofitted = add_se(model, 2)
    x = torch.randn(2, 8, 6, 6)
    assert_same_function(retrofitted, model, torch.randn(2, 3, 9, 9))
    assert len(se_modules(retrofitted)) == 2
    assert _same_or_loud(retrofitted.units[0], model.units[0], x)
    assert _same_or_loud(retrofitted.units[0], model.units[0], x, pads=(0, 0))


def test_a_frozen_network_and_its_frozen_blocks() -> None:
    model = SmallResNet().eval().requires_grad_(False)
    retrofitted = add_se(model, 2)
    trained = {name for name, p in retrofitted.named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.{name}" for path, se in se_modules(retrofitted).items() for name, _ in se.named_parameters()
    }
    assert len(trained) == 4
