"""Networks of a user's, with gates that are constant, or are not."""

from __future__ import annotations

from typing import Any

import torch
from networks import randomised, se_modules
from torch import Tensor, nn


class Unit(nn.Module):
    """A residual unit whose parts are given."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def own(*units: nn.Module, width: int = 8) -> nn.Module:
    """A network of units, in double precision."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    return randomised(nn.Sequential(nn.Conv2d(3, width, 3), *units, *head)).double().eval()


def conv(width: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1, **options)


def images(batch: int = 6, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def with_constant_gates(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gates that come from the last layer's bias alone, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for se in se_modules(model).values():
            se.fc[2].weight.zero_()
            se.fc[2].bias.copy_(torch.randn(se.channel, generator=generator) * 0.5)
    return model


def with_varying_gates(model: nn.Module, *paths: str) -> nn.Module:
    """Gates of some SE modules that depend much on the input, in place."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path in paths:
            for parameter in model.get_submodule(path).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())
