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
from torch import Tensor, nn

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; within a round each runs once, in an order drawn anew."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(-warmup, rounds):
        for name in order.sample(list(candidates), len(candidates)):
            synchronize(device)
            start = time.perf_counter()
            made = candidates[name]()
            synchronize(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
            del made  # freeing a network is not part of making it
    return seconds


def synchronize(device: str) -> None:
    """Wait for all that a GPU has been given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def forward(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A step of inference."""
    model.eval()

    def step() -> None:
        with torch.inference_mode(), autocast(x, dtype):
            model(x)

    return step


def autocast(x: Tensor, dtype: torch.dtype) -> torch.autocast:
    """For a single step: within one context for all of them, the weights would be converted in the first step alone."""
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)


def peak(step: Callable[[], object], device: str) -> str:
    """The most memory that a step takes beside what is there, in MiB."""
    if device != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"


def inference_rows(
    models: Mapping[str, nn.Module],
    x: Tensor,
    bases: Sequence[str],
    *,
    compiled: bool,
    dtype: torch.dtype,
    rounds: int,
    device: str,
) -> list[list[object]]:
    """For each network: milliseconds of a forward pass, images a second, the ratios to ``bases``, and peak memory."""
    torch.compiler.reset()
    steps = {name: forward(torch.compile(m) if compiled else m, x, dtype) for name, m in models.items()}  # type: ignore[arg-type]
    seconds = interleaved(steps, rounds=rounds, warmup=3, device=device)
    memory = {name: peak(step, device) for name, step in steps.items()}
    rows: list[list[object]] = []
    for name, own in seconds.items():
        against = [ratio(own, seconds[base]) if name != base else "1" for base in bases]
        images = f"{len(x) / statistics.median(own):,.1f}"
        rows.append([name, milliseconds(own), images, *against, memory[name]])
    return rows


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
