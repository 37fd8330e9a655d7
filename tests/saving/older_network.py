"""The small network whose folders in ``older/`` were written by version 0.2.0, when a static factor was a gate of SE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["older_network"]


class Unit(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


def older_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), Unit(nn.SiLU()), Unit(nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    return network.eval()
