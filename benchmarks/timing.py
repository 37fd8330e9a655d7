"""Timing that survives a busy machine: candidates take turns within one run, and are compared round by round."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import timm
import torch
import torchvision


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; within a round each runs once, in an order drawn anew."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(-warmup, rounds):
        for name in order.sample(list(candidates), len(candidates)):
            synchronize()
            start = time.perf_counter()
            candidates[name]()
            synchronize()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(mine: Sequence[float], base: Sequence[float]) -> str:
    """Median of the ratios of the rounds, and the range that the middle half of them lies in."""
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    if len(ratios) < 4:
        return f"{statistics.median(ratios):.3f}"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def machine(device: str = "cpu") -> str:
    """What the numbers were taken on, in general words."""
    where = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}; torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
