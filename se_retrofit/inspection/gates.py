"""The gates of a retrofitted network: statistics of each site, and a logger that collects them in a training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention import check_gates
from ..errors import check_module
from ..retrofit import plan_of

HARDLY = 0.01  # a gate whose standard deviation over inputs is less than this is as good as constant
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
MARGIN = 0.025  # fraction of the gates' range: this close to an end, the slope is below a tenth of its maximum


@dataclass(frozen=True, eq=False)
class SiteGates:
    """The gates of one site.

    Attributes:
        path: path of the SE module.
        count: number of gate vectors seen.
        mean, std: mean and standard deviation of each channel's gate over the inputs, ``(C,)``, on the CPU.
        low, high: the smallest and the largest gate.
        saturated: fraction of the gates that are close to an end of their range: below 0.05 or above 1.95 for the
            identity gate, below 0.025 or above 0.975 for the paper's; 0 for static factors.
        size: size of the feature map, such as ``"56x56"`` (only from ``excitations``); sites of one size form a stage.
        class_means: for each label, the mean of each channel's gate over the inputs of that class; empty without labels.
    """

    path: str
    count: int
    mean: Tensor
    std: Tensor
    low: float
    high: float
    saturated: float = 0.0
    size: str = ""
    class_means: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, seen: Moments, size: str = "", classes: Mapping[int, Moments] | None = None) -> SiteGates:
        """Build the statistics of a site from what was collected over all inputs, and over those of each class."""
        means = {label: own.mean.cpu() for label, own in sorted((classes or {}).items())}
        low, high, beyond = (float(number) for number in (seen.low, seen.high, seen.beyond))
        return cls(path, int(seen.rows), seen.mean.cpu(), seen.std.cpu(), low, high, beyond, size, means)

    @property
    def name(self) -> str:
        """Short name of the site: the path without the name of the SE module."""
        return self.path.removesuffix("se_attention").rstrip(".") or "(model)"

    @property
    def variation(self) -> float:
        """Variation of the gates between inputs: the standard deviation, averaged over channels."""
        return float(self.std.mean())

    @property
    def between(self) -> float:
        """Fraction of the gates' variance that is between inputs, from 0 to 1; the rest is between channels."""
        inputs, channels = self.std.square().mean(), self.mean.var(correction=0)
        return float(inputs / (inputs + channels)) if inputs + channels > 0 else 0.0

    @property
    def class_spread(self) -> float | None:
        """Variation between classes: the standard deviation of the class means, averaged over channels."""
        if len(self.class_means) < 2:
            return None
        return float(torch.stack(list(self.class_means.values())).std(0, correction=0).mean())

    @property
    def note(self) -> str:
        """A remark on what stands out about the site; empty if nothing does."""
        if self.low == self.high == 1.0:
            return "all gates are exactly 1: not fine-tuned yet, or all that SE sees is zero"
        if self.count > 1 and self.variation < HARDLY:
            if abs(self.mean - 1).max() < 10 * HARDLY:
                return "hardly varies between inputs and is close to 1: so far it does next to nothing"
            return "hardly varies between inputs: it acts as a constant scale of each channel"
        return ""

    def quartiles(self) -> dict[str, Any]:
        """Return a few numbers that JSON can hold: the quartiles of the channels' mean gates, their range, their
        variation, and the saturated fraction."""
        channels = torch.quantile(self.mean, self.mean.new_tensor(QUANTILES))
        numbers = {name: getattr(self, name) for name in ("low", "high", "variation", "saturated")}
        return {"channels": channels.tolist(), **numbers}


class Moments:
    """Mean, spread and range of the rows of all batches, updated by Chan's method, which avoids cancellation; and the
    fraction of values ``beyond`` the limits. The mean is ``(C,)``, the other statistics are tensors without dims.

    Adding a batch reads no value from the device and has no data-dependent branch, so it never waits for the device,
    and compiles once.
    """

    def __init__(
        self, columns: int, dtype: torch.dtype = torch.float32, limits: tuple[float, float] = (-math.inf, math.inf),
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.limits = limits
        self.mean, self._squares = (torch.zeros(columns, dtype=dtype, device=device) for _ in range(2))
        self.rows, self.beyond = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
        self.low, self.high = (self.rows.new_full((), limit) for limit in (math.inf, -math.inf))

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Add a batch, ``(N, C)``, and move the statistics to its device; a batch without rows changes nothing."""
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
        """The standard deviation of each column over the rows, ``(C,)``; NaN before the first batch."""
        return (self._squares / self.rows).sqrt()

    def _move(self, device: torch.device) -> None:
        for name in ("rows", "mean", "_squares", "low", "high", "beyond"):
            setattr(self, name, getattr(self, name).to(device))


def saturation_limits(se: Any) -> tuple[float, float]:
    """Return the limits below and above which the gates of an SE module are saturated."""
    if se.gate_range is None:
        return -math.inf, math.inf
    low, high = se.gate_range
    margin = MARGIN * (high - low)
    return low + margin, high - margin


def _hear(se: Any, take: Callable[[Tensor], object]) -> RemovableHandle:
    """Call ``take`` with a module's gates, ``(N, C)``, detached, each time that the module runs, until ``remove`` is
    called on the returned handle."""

    def hear(module: nn.Module, args: tuple[Any, ...], gates: Tensor) -> None:
        take(gates.detach().flatten(0, -2))

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        with torch.no_grad():
            take(se.gates(args[-1]).flatten(0, -2))

    if se.gate_layer:  # already computed, even in a fused SE, whose first argument is the norm
        return se.get_submodule(se.gate_layer).register_forward_hook(hear)
    return se.register_forward_pre_hook(read)


def gates_over(
    model: nn.Module, ses: Mapping[str, Any], batches: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[str, SiteGates]:
    """Run a model, as it is, over batches of inputs and labels, and collect the gates of the modules ``ses`` in
    float64. Returns their statistics by path, in the same order, without modules that were never called."""
    seen = {path: Moments(se.channel, torch.float64, saturation_limits(se)) for path, se in ses.items()}
    classes: dict[str, dict[int, Moments]] = {path: {} for path in ses}
    sizes: dict[str, str] = {}
    labels: Tensor | None = None

    def measure(path: str, se: Any, args: tuple[Any, ...]) -> None:
        shape = args[-1].shape
        space = [str(size) for dim, size in enumerate(shape) if dim not in (0, se.channel_dim % len(shape))]
        sizes.setdefault(path, "x".join(space) or "1")

    def take(path: str, gates: Tensor) -> None:
        gates = gates.to("cpu", torch.float64)
        seen[path].add(gates)
        if labels is not None and len(labels) == len(gates):
            for label in labels.unique().tolist():
                own = classes[path].setdefault(label, Moments(gates.shape[1], torch.float64))
                own.add(gates[labels == label])

    hooks: list[RemovableHandle] = []
    try:
        for path, se in ses.items():
            hooks += [se.register_forward_pre_hook(partial(measure, path)), _hear(se, partial(take, path))]
        with torch.no_grad():
            for inputs, given in batches:
                labels = None if given is None else given.cpu()
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: SiteGates.of(path, m, sizes[path], classes[path]) for path, m in seen.items() if m.rows}


def gated_modules(model: nn.Module) -> dict[str, Any]:
    """Return the SE modules of a model, in the order of its plan."""
    check_module(model)
    ses = {site.path: model.get_submodule(site.path) for site in plan_of(model).sites}
    check_gates(ses, "there are none to look at")
    return ses


class GateLogger:
    """Collects the gates of a retrofitted network while it runs, for a training loop of your own.

    It uses hooks and changes nothing. The statistics stay on the network's device until ``summary`` or ``write`` is
    called, so a batch costs a few small operations and no synchronisation. ``finetune`` logs gates by itself.

    Args:
        model: a network from ``add_se``; if it is wrapped (DDP, ``torch.compile``), the network inside. Compiled code
            only calls hooks that existed when it was compiled, so create the logger before the first step.

    Raises:
        RetrofitError: If the model has no SE from ``add_se``, or has modules without gates for each channel (CBAM).
        TypeError: If ``model`` is not an nn.Module.

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

    def __init__(self, model: nn.Module) -> None:
        self._ses = gated_modules(model)
        self.reset()
        self._hooks = [_hear(se, partial(self._take, path)) for path, se in self._ses.items()]

    def _take(self, path: str, gates: Tensor) -> None:
        self._moments[path].add(gates)

    def summary(self) -> dict[str, SiteGates]:
        """Return the statistics of each SE module that has run since the last ``reset``, by its path."""
        return {path: SiteGates.of(path, seen) for path, seen in self._moments.items() if seen.rows}

    def reset(self) -> None:
        """Discard the statistics, for the next epoch."""
        self._moments = {
            # on the module's device from the start: compiled code would be compiled again once they move there
            path: Moments(se.channel, limits=saturation_limits(se), device=next(se.parameters(), torch.empty(0)).device)
            for path, se in self._ses.items()
        }

    def write(self, writer: Any, step: int) -> None:
        """Write the summary to TensorBoard: for each site, a histogram of its channels' mean gates, ``gates/PATH``, and
        the variation between inputs as a scalar, ``gates_variation/PATH``.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or similar, with ``add_histogram`` and ``add_scalar``.
            step: the training step.
        """
        for path, seen in self.summary().items():
            writer.add_histogram(f"gates/{path}", seen.mean, step)
            writer.add_scalar(f"gates_variation/{path}", seen.variation, step)

    def close(self) -> None:
        """Remove the hooks; the statistics are kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> GateLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
