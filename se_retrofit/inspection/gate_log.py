"""The gates of a network in training: gathered while it runs, for a log, for TensorBoard and for a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention import check_gates
from ..errors import RetrofitError, brief, check_module, extra
from ..retrofit import plan_of
from ..surgery.splice.undo import is_retrofitted
from .moments import Moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GateLogger", "GateSummary", "gates_of", "plot_gates", "saturation_limits"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
MARGIN = (
    0.025  # of the range of gates: as close to an end they are saturated, their slope is below a tenth of its highest
)


@dataclass(frozen=True, eq=False)
class GateSummary:
    """The gates of one site since the last ``reset``.

    Attributes:
        path: of the SE module.
        count: number of gate vectors seen.
        mean, std: of each channel's gate over the inputs, ``(C,)``, on the CPU.
        low, high: the smallest and the largest gate.
        saturated: the share of the gates that is close to an end of their range: below 0.05 or above 1.95 of the identity
            gate, below 0.025 or above 0.975 of the paper's; 0 for static factors.
    """

    path: str
    count: int
    mean: Tensor
    std: Tensor
    low: float
    high: float
    saturated: float = 0.0

    @property
    def variation(self) -> float:
        """How much the gates vary between inputs: the standard deviation, averaged over channels."""
        return float(self.std.mean())

    def to_dict(self) -> dict[str, Any]:
        """A few numbers, fit for JSON: the quartiles of the channels' mean gates, the range, the variation, and the share that
        is saturated."""
        quartiles = torch.quantile(self.mean, torch.tensor(QUANTILES, dtype=self.mean.dtype))
        return {
            "channels": [float(value) for value in quartiles],
            "low": self.low,
            "high": self.high,
            "variation": self.variation,
            "saturated": self.saturated,
        }


def saturation_limits(se: Any) -> tuple[float, float]:
    """The gates of an SE module are saturated below the first and above the second."""
    if se.gate_range is None:
        return -math.inf, math.inf
    low, high = se.gate_range
    margin = MARGIN * (high - low)
    return low + margin, high - margin


def gates_of(se: Any, take: Callable[[Tensor], object]) -> RemovableHandle:
    """Call ``take`` with a module's gates, ``(N, C)`` without their gradients, each time that it runs; until the handle's
    ``remove``."""

    def hear(module: nn.Module, args: tuple[Any, ...], gates: Tensor) -> None:
        take(gates.detach().flatten(0, -2))

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        with torch.no_grad():
            take(se.gates(args[-1]).flatten(0, -2))

    if se.gate_layer:  # computed already, as also in a fused SE, which is called with the norm before its input
        return se.get_submodule(se.gate_layer).register_forward_hook(hear)
    return se.register_forward_pre_hook(read)


class GateLogger:
    """Gathers the gates of a retrofitted network while it runs, in a training loop of your own.

    It listens with hooks and changes nothing. What it gathers stays on the network's device until ``summary`` or
    ``write`` asks for it, so that a batch costs a few small operations and no waiting. ``finetune`` logs gates by itself.

    Args:
        model: a network that ``add_se`` has retrofitted; of a wrapped one (DDP, ``torch.compile``), the network inside. Compiled
            code hears only a logger that was there when it was compiled, so make the logger before the first step.
        every: listen to each ``every``-th call of a site only.

    Raises:
        RetrofitError: the model has no SE that ``add_se`` put in, or modules without gates for each channel (CBAM); or ``every``
            is less than 1.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se
        >>> from se_retrofit.inspection import GateLogger
        >>> model = add_se(timm.create_model("resnet18"))
        >>> with GateLogger(model) as gates:
        ...     for epoch in range(2):
        ...         _ = model(torch.randn(2, 3, 64, 64))
        ...         found = gates.summary()
        ...         gates.reset()
        >>> len(found), found["layer1.0.se_attention"].high
        (8, 1.0)
    """

    def __init__(self, model: nn.Module, *, every: int = 1) -> None:
        check_module(model)
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be a positive int, got {brief(every)} of type {type(every).__name__}")
        if every < 1:
            raise RetrofitError(f"every must be at least 1, got {every}")
        plan_of(model)  # raises where there is no SE
        self.every = every
        self._ses: dict[str, Any] = {path: se for path, se in model.named_modules() if is_retrofitted(se)}
        check_gates(self._ses, "there are none to gather")
        self.reset()
        self._hooks = [gates_of(se, partial(self._take, path)) for path, se in self._ses.items()]

    def _take(self, path: str, gates: Tensor) -> None:
        if self.every > 1:  # else nothing is counted, so that compiled code sees no number change
            self._calls[path] += 1
            if (self._calls[path] - 1) % self.every:
                return
        self._moments[path].add(gates)

    def summary(self) -> dict[str, GateSummary]:
        """By the path of each SE module that has run since the last ``reset``, in the order of the network's modules, what its
        gates did."""
        return {
            path: GateSummary(
                path, int(m.rows), m.mean.cpu(), m.std.cpu(), float(m.low), float(m.high), float(m.beyond)
            )
            for path, m in self._moments.items()
            if m.rows
        }

    def reset(self) -> None:
        """Forget what was gathered, for the next epoch."""
        self._calls = dict.fromkeys(self._ses, 0)
        self._moments = {path: Moments(se.channel, limits=saturation_limits(se)) for path, se in self._ses.items()}

    def write(self, writer: Any, step: int, *, tag: str = "gates") -> None:
        """Write the summary to TensorBoard: for each site a histogram of its channels' mean gates, and the variation
        between inputs as a scalar.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_histogram`` and ``add_scalar``.
            step: of the training, on the axis.
            tag: what the names begin with: ``gates/PATH`` and ``gates_variation/PATH``.
        """
        for path, seen in self.summary().items():
            writer.add_histogram(f"{tag}/{path}", seen.mean, step)
            writer.add_scalar(f"{tag}_variation/{path}", seen.variation, step)

    def close(self) -> None:
        """Stop listening; what was gathered stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> GateLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def plot_gates(epochs: Mapping[int, Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """How the gates moved in training. Each site has a panel that shows, for each epoch, the range over its channels, the
    middle half of them and their median; the title has how much the gates vary between inputs in the last epoch.

    Args:
        epochs: by the number of each epoch, what ``GateLogger.summary`` gave for it. In the place of a ``GateSummary`` there may be
            what its ``to_dict`` gives; the ``"gates"`` of the rows that ``finetune`` writes to ``metrics.jsonl`` are such.
        path: where to save the picture, in any format that matplotlib writes; None not to.

    Returns:
        The matplotlib ``Figure``.

    Raises:
        RetrofitError: no epoch has gates, or matplotlib is not installed.
    """
    with extra("inspect"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

    rows = {
        epoch: {path: seen.to_dict() if isinstance(seen, GateSummary) else seen for path, seen in row.items()}
        for epoch, row in sorted(epochs.items())
    }
    sites = list(dict.fromkeys(path for row in rows.values() for path in row))
    if not sites:
        raise RetrofitError("there are no gates to draw: none of the epochs has any")
    columns = min(4, len(sites))
    lines = -(-len(sites) // columns)
    figure = Figure(figsize=(2.7 * columns + 0.6, 2.2 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, site in zip(grid.flat, sites, strict=False):
        at = [epoch for epoch, row in rows.items() if site in row]
        least, lower, middle, upper, most = zip(*(rows[epoch][site]["channels"] for epoch in at), strict=True)
        variation = [rows[epoch][site]["variation"] for epoch in at]
        axes.axhline(1.0, color="#94a3b8", linewidth=0.8, linestyle="--")
        axes.fill_between(at, least, most, color="#ffe4c7", linewidth=0, label="all channels")
        axes.fill_between(at, lower, upper, color="#fdba74", linewidth=0, label="middle half")
        axes.plot(at, middle, color="#c2410c", marker=".", markersize=4, linewidth=1.2, label="median")
        axes.set_title(f"{site.removesuffix('.se_attention')}   ± {variation[-1]:.3f}", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(sites) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("mean gate of each channel", fontsize=9)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False,
        title="± is the variation between inputs, in the last epoch", title_fontsize=8,
    )  # fmt: skip
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
