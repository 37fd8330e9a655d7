"""Networks such as users write, and all that must hold for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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

from se_retrofit import add_se, plan_se, remove_se

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def check(
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
