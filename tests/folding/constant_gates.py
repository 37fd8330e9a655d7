"""Retrofitted networks whose gates are constant, or are not."""

from __future__ import annotations

import torch
from networks import se_modules
from torch import Tensor, nn


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
