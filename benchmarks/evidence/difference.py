"""Paired differences between runs, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with half the width of its 95% interval by Student's t (NaN for a single pair)."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """From one difference for each pair, of which there is at least one."""
        count = len(values)
        half = float(t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count) if count > 1 else math.nan
        return cls(fmean(values), half, count)

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        text = f"{self.mean:+.2f} ± {self.half:.2f}"
        return f"**{text}**" if self.clear else text
