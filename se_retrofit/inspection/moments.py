"""Mean, spread and range of vectors that come batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]


class Moments:
    """Statistics over the rows of all batches, gathered by Chan's update, in which nothing cancels out.

    Everything stays on the device and in the format of the values, so that adding a batch waits for nothing.

    Attributes:
        count: number of rows so far.
        mean: of each column, ``(C,)``; valid after the first batch.
        low, high: the smallest and the largest value of all, as tensors without dims.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.low = self.high = self._squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in a batch, ``(N, C)``; one without rows changes nothing."""
        number = len(values)
        if not number:
            return
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        low, high = values.aminmax()
        if self.count:
            delta, total = mean - self.mean, self.count + number
            squares = self._squares + squares + delta.square() * self.count * number / total
            mean = self.mean + delta * number / total
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count, self.mean, self._squares = self.count + number, mean, squares
        self.low, self.high = low, high

    @property
    def std(self) -> Tensor:
        """The standard deviation of each column over the rows, ``(C,)``."""
        return (self._squares / self.count).sqrt()
