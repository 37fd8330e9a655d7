"""Blocks that a user wrote: what their forwards do, and how they choose what they do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    assert_same_function,
    gradients,
    randomised,
    run,
    same_tensors,
    se_modules,
)
from own_networks import Branch, SharedReLU, SmallResNet, Unit, check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from se_retrofit import RetrofitError, add_se, has_se, plan_se, remove_se

# What blocks do ---------------------------


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
    check(
        SmallResNet(unit=block), torch.randn(2, 3, 9, 9), blocks={f"units.0{inner}", f"units.1{inner}"},
        more=(torch.randn(1, 3, 12, 7), torch.randn(5, 3, 9, 9)),
    )  # fmt: skip


@pytest.mark.parametrize("block", [Checkpointed, InnerCheckpoint, Wrapped], ids=lambda block: block.__name__)
def test_contexts_within_a_block_are_kept_or_the_block_is_left_out_with_the_reason(block: type[nn.Module]) -> None:
    """A graph can't show a checkpoint or a change of the grad mode: nothing may be lost silently."""
    model = randomised(SmallResNet(unit=block)).eval()
    model.units.append(Unit(8))
    plan = plan_se(model, 2)
    left = [skip for skip in plan.skipped if skip.block != "stem"]
    assert {found.block for found in (*plan.sites, *left)} == {"units.0", "units.1", "units.2"}
    assert "units.2" in {site.block for site in plan.sites}
    for skip in left:
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
    retrofitted = check(SmallResNet(unit=BothWays), torch.randn(2, 3, 9, 9), blocks=prefix)
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


class ReLUFirst(nn.Module):
    """The branch's first ReLU overwrites the block's input, one module further in."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x)) if self.swapped else self.body(x) + x


def test_the_skip_may_be_overwritten_inside_of_the_branch() -> None:
    x = torch.randn(2, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ReLUFirst(swapped=False))
    retrofitted = add_se(model, 2, placement="identity", example_inputs=x)
    assert list(se_modules(retrofitted)) == ["1.se_attention"]
    assert torch.equal(retrofitted(x), model(x))
    with pytest.raises(RetrofitError, match=r"1: the value .* is overwritten in place"):
        add_se(nn.Sequential(nn.Conv2d(3, 8, 3), ReLUFirst(swapped=True)), 2, placement="identity", example_inputs=x)
