"""What the gates do: their statistics over a data set, and a plot of them as in the SE paper's section 6.6."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..attention import check_gates
from ..errors import RetrofitError, check_module, extra
from ..paths import save_figure
from ..retrofit import plan_of
from ..surgery.record.copying import has_values
from ..surgery.splice.undo import is_retrofitted
from ..tables import aligned
from .gate_log import gates_of
from .moments import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Excitations", "SiteExcitation", "excitations"]

HARDLY = 0.01  # a gate that varies by less than this, as a standard deviation over inputs, is as good as constant
MOST_CLASSES = 5  # as many as the paper's figure shows


@dataclass(frozen=True, eq=False)
class SiteExcitation:
    """The gates of one site.

    Attributes:
        path, block: of the SE module and of its block.
        size: of the feature map that it scales, as ``"56x56"``; sites of one size make a stage.
        count: number of gate vectors seen.
        mean, std: of each channel's gate over the inputs, ``(C,)``.
        low, high: the smallest and the largest gate.
        class_means: for each label, the mean of each channel's gate over the inputs of that class; empty without
            labels.
    """

    path: str
    block: str
    size: str
    count: int
    mean: Tensor
    std: Tensor
    low: float
    high: float
    class_means: dict[int, Tensor] = field(default_factory=dict)

    @property
    def variation(self) -> float:
        """How much the gates vary between inputs: the standard deviation, averaged over channels."""
        return float(self.std.mean())

    @property
    def class_spread(self) -> float | None:
        """How much they vary between classes: the standard deviation of the class means, averaged over channels."""
        if len(self.class_means) < 2:
            return None
        return float(torch.stack(list(self.class_means.values())).std(0, correction=0).mean())

    @property
    def note(self) -> str:
        """What stands out about the site, in words; empty if nothing does."""
        if self.low == self.high == 1.0:
            return "all gates are exactly 1: not fine-tuned yet, or all that SE sees is zero"
        if self.count > 1 and self.variation < HARDLY:
            if abs(self.mean - 1).max() < 10 * HARDLY:
                return "hardly varies between inputs and is close to 1: so far it does next to nothing"
            return "hardly varies between inputs: it acts as a constant scale of each channel"
        return ""


@dataclass(frozen=True, eq=False)
class Excitations:
    """What ``excitations`` found: ``sites`` in the order of the plan, over ``inputs`` inputs; ``missed`` are the SE
    modules that were never called. ``str`` is a table."""

    sites: tuple[SiteExcitation, ...]
    inputs: int
    missed: tuple[str, ...] = ()

    @property
    def notes(self) -> dict[str, str]:
        """What stands out, by the path of the SE module."""
        notes = {site.path: site.note for site in self.sites if site.note}
        return notes | dict.fromkeys(self.missed, "never called on these inputs")

    @property
    def stages(self) -> list[list[SiteExcitation]]:
        """The sites in groups: neighbours whose feature maps have the same size."""
        return [list(group) for _, group in groupby(self.sites, key=lambda site: site.size)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for JSON."""
        return {
            "inputs": self.inputs,
            "missed": list(self.missed),
            "sites": [
                {
                    "path": site.path,
                    "block": site.block,
                    "size": site.size,
                    "count": site.count,
                    "low": site.low,
                    "high": site.high,
                    "mean": site.mean.tolist(),
                    "std": site.std.tolist(),
                    "variation": site.variation,
                    "class_spread": site.class_spread,
                    "class_means": {str(label): mean.tolist() for label, mean in site.class_means.items()},
                    "note": site.note,
                }
                for site in self.sites
            ],
        }

    def __str__(self) -> str:
        rows = [["site", "map", "channels", "mean", "lowest", "highest", "std over inputs", "std over classes"]]
        for site in self.sites:
            spread = site.class_spread
            rows.append(
                [
                    site.path,
                    site.size,
                    f"{len(site.mean):,}",
                    f"{float(site.mean.mean()):.4f}",
                    f"{site.low:.4f}",
                    f"{site.high:.4f}",
                    f"{site.variation:.4f}",
                    "" if spread is None else f"{spread:.4f}",
                ]
            )
        rows.insert(1, ["-" * max(len(row[i]) for row in rows) for i in range(len(rows[0]))])
        lines = [*aligned(rows), f"gates over {self.inputs:,} inputs"]
        paths: dict[str, list[str]] = {}
        for path, note in self.notes.items():
            paths.setdefault(note, []).append(path)
        for note, noted in paths.items():
            lines.append(f"note: {'all sites' if len(noted) == len(self.sites) else ', '.join(noted)}: {note}")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """A figure with a row a stage: on the left each site's gates, averaged over the inputs, as a box over its
        channels; on the right the stage's last site, channel by channel, with lines for up to five classes where labels
        were given.

        Args:
            path: where to save it, as an image of any format that matplotlib writes; None not to.

        Returns:
            The matplotlib ``Figure``.

        Raises:
            RetrofitError: the folder does not exist, matplotlib writes no such format or is not installed.
        """
        with extra("inspect"):
            from matplotlib.figure import Figure

        stages = self.stages
        figure = Figure(figsize=(11, 0.5 + 2.4 * len(stages)), layout="constrained")
        axes = figure.subplots(len(stages), 2, squeeze=False, width_ratios=(1, 1.5))
        for (left, right), stage in zip(axes, stages, strict=True):
            _plot_stage(left, stage)
            _plot_site(right, stage[-1])
        if path is not None:
            save_figure(figure, path)
        return figure


def _plot_stage(axes: Axes, stage: list[SiteExcitation]) -> None:
    axes.axhline(1.0, color="#94a3b8", linewidth=0.8, linestyle="--")
    boxes = axes.boxplot(
        [site.mean.numpy() for site in stage],
        whis=(0, 100),
        widths=0.6,
        patch_artist=True,
        medianprops={"color": "#c2410c"},
    )
    for box in boxes["boxes"]:
        box.set(facecolor="#ffe4c7", edgecolor="#64748b")
    axes.set_xticks(range(1, len(stage) + 1), [site.block.removeprefix("features.") or "(model)" for site in stage])
    longest = max(len(site.block) for site in stage)
    axes.tick_params(axis="x", labelsize=8, rotation=45 if len(stage) * longest > 50 else 0)
    axes.set_title(f"{stage[0].size}: gates of the channels, mean over inputs", fontsize=9)
    axes.set_ylabel("gate")
    _give_room(axes)


def _plot_site(axes: Axes, site: SiteExcitation) -> None:
    order = site.mean.argsort()
    mean, std, channels = site.mean[order].numpy(), site.std[order].numpy(), range(len(order))
    axes.axhline(1.0, color="#94a3b8", linewidth=0.8, linestyle="--")
    axes.fill_between(
        channels, mean - std, mean + std, color="#cbd5e1", alpha=0.6, linewidth=0, label="± std over inputs"
    )
    for label in sorted(site.class_means)[:MOST_CLASSES]:
        axes.plot(channels, site.class_means[label][order].numpy(), linewidth=0.9, alpha=0.9, label=f"class {label}")
    axes.plot(channels, mean, color="#1e293b", linewidth=1.4, label="all")
    axes.set_title(f"{site.block or '(model)'}: gate by channel, sorted by mean", fontsize=9)
    axes.set_xlabel("channel", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _give_room(axes)


def _give_room(axes: Axes) -> None:
    """At least 0.1 of the gates' range, lest a plot of gates that are all about 1 show rounding errors."""
    low, high = axes.get_ylim()
    if high - low < 0.1:
        middle = (low + high) / 2
        axes.set_ylim(middle - 0.05, middle + 0.05)


# Collecting -----------------------------------------------------------------------------------------------------------


class _Statistics:
    """One site's gates: their moments, and for each label the sum of the gates of its inputs."""

    def __init__(self, channels: int) -> None:
        self.moments = Moments(channels, torch.float64)
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.size = ""

    def add(self, gates: Tensor, labels: Tensor | None) -> None:
        gates = gates.detach().flatten(0, -2).to("cpu", torch.float64)
        self.moments.add(gates)
        if labels is not None and len(labels) == len(gates):
            for label in labels.unique().tolist():
                own = gates[labels == label]
                self.sums[label] = self.sums.get(label, 0) + own.sum(0)
                self.counts[label] = self.counts.get(label, 0) + len(own)

    def result(self, path: str, block: str) -> SiteExcitation:
        means = {label: self.sums[label] / self.counts[label] for label in sorted(self.sums)}
        seen = self.moments
        return SiteExcitation(
            path, block, self.size, int(seen.rows), seen.mean, seen.std, float(seen.low), float(seen.high), means
        )


def excitations(model: nn.Module, loader: Iterable[Any], *, max_batches: int | None = None) -> Excitations:
    """Run a retrofitted model over data in eval mode and gather what its gates do.

    The model is not changed: its training flags are put back, its norms' statistics are not updated, and the hooks that
    listen are taken off again, also if the run fails.

    Args:
        model: a model that ``add_se`` has retrofitted.
        loader: yields batches: tensors, or tuples or lists of inputs and labels (and more, which is ignored). Integer
            labels, one for each input, give statistics by class.
        max_batches: stop after so many.

    Raises:
        RetrofitError: the model has no SE that ``add_se`` put in, modules without gates for each channel (CBAM), or no values (on the meta device, or of fake
            tensors); or the loader yields nothing.
        TypeError: the model is none, or a batch is neither a tensor nor begins with one.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se
        >>> from se_retrofit.inspection import excitations
        >>> model = add_se(timm.create_model("resnet18"))
        >>> found = excitations(model, [torch.randn(2, 3, 64, 64)])
        >>> len(found.sites), found.sites[0].low, found.sites[0].high
        (8, 1.0, 1.0)
    """
    check_module(model)
    blocks = {site.path: site.block for site in plan_of(model).sites}
    ses = {path: module for path, module in model.named_modules() if is_retrofitted(module)}
    check_gates(ses, "there are none to look at")
    for name, parameter in model.named_parameters():
        if not has_values(parameter):
            kind = "on the meta device" if parameter.is_meta else "a fake tensor"
            raise RetrofitError(f"{name} is {kind}, so there are no gates to look at; load weights first")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    gathered: OrderedDict[str, _Statistics] = OrderedDict((path, _Statistics(se.channel)) for path, se in ses.items())
    labels: Tensor | None = None
    inputs = 0

    def listen(path: str, se: Any) -> list[Any]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, dim = args[-1], se.channel_dim % args[-1].dim()  # a fused SE is called with the norm before its input
            gathered[path].size = (
                gathered[path].size or "x".join(str(s) for d, s in enumerate(x.shape) if d not in (0, dim)) or "1"
            )

        return [se.register_forward_pre_hook(see), gates_of(se, lambda gates: gathered[path].add(gates, labels))]

    training = [(module, module.training) for module in model.modules()]
    hooks: list[Any] = []
    try:
        for path, se in ses.items():
            hooks += listen(path, se)
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in islice(loader, max_batches):
                data, labels = _parted(batch)
                inputs += len(data)
                model(tree_map_only(Tensor, lambda t: t.to(device), data))
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
    if not inputs:
        raise RetrofitError("the loader yields no batch, so there are no gates to look at")
    sites = tuple(gathered[path].result(path, blocks[path]) for path in blocks if gathered[path].moments.rows)
    return Excitations(sites, inputs, tuple(path for path in blocks if not gathered[path].moments.rows))


def _parted(batch: Any) -> tuple[Any, Tensor | None]:
    """The inputs of a batch, and its labels if there are any that name classes."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        rest = batch[1] if len(batch) > 1 else None
        if isinstance(rest, Tensor) and rest.dim() == 1 and len(rest) == len(batch[0]) and not rest.is_floating_point():
            return batch[0], rest.cpu()
        return batch[0], None
    raise TypeError(f"each batch must be a tensor, or a tuple or list that begins with one, got {type(batch).__name__}")
