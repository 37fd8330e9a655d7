"""Mean, spread and range of vectors that come batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Statistics over the rows of all batches, gathered by Chan's update, in which nothing cancels out.

    Adding a batch reads no number from the device and takes no branch that depends on what came before, so it waits for
    nothing and compiles once.

    Args:
        columns: how many there are, ``C``.
        dtype: of the statistics.
        limits: values below the first and above the second are counted.

    Attributes:
        rows: number of rows so far, as a tensor without dims.
        mean: of each column, ``(C,)``.
        low, high: the smallest and the largest value of all, as tensors without dims.
        beyond: the share of all values that is beyond the limits, likewise.
    """

    def __init__(
        self, columns: int, dtype: torch.dtype = torch.float32, limits: tuple[float, float] = (-math.inf, math.inf)
    ) -> None:
        self.limits = limits
        self.rows = torch.zeros((), dtype=dtype)
        self.mean = torch.zeros(columns, dtype=dtype)
        self._squares = torch.zeros(columns, dtype=dtype)
        self.low, self.high = (torch.full((), limit, dtype=dtype) for limit in (math.inf, -math.inf))
        self.beyond = torch.zeros((), dtype=dtype)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Take in a batch, ``(N, C)``, on whose device the statistics are from then on; one without rows changes nothing."""
        number = len(values)
        if not number:
            return
        if self.mean.device != values.device:
            self._move(values.device)
        values = values.to(self.mean.dtype)
        mean = values.mean(0)
        low, high = values.aminmax()
        share = number / (self.rows + number)
        delta = mean - self.mean
        self._squares = self._squares + (values - mean).square().sum(0) + delta.square() * self.rows * share
        self.mean = self.mean + delta * share
        beyond = ((values < self.limits[0]) | (values > self.limits[1])).to(values.dtype).mean()
        self.beyond = self.beyond + (beyond - self.beyond) * share
        self.rows = self.rows + number
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    @property
    def std(self) -> Tensor:
        """The standard deviation of each column over the rows, ``(C,)``; NaN before the first."""
        return (self._squares / self.rows).sqrt()

    def _move(self, device: torch.device) -> None:
        for name in ("rows", "mean", "_squares", "low", "high", "beyond"):
            setattr(self, name, getattr(self, name).to(device))
