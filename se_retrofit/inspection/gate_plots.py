"""Plots of gates: over a data set, as in section 6.6 of the SE paper, and over the epochs of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RetrofitError
from ..paths import as_written, new_figure, save_figure
from .gates import SiteGates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 5  # as in the paper's figure
# the line at which a gate changes nothing
_ONE: dict[str, Any] = {"color": "#94a3b8", "linewidth": 0.8, "linestyle": "--"}


def plot_stages(stages: list[list[SiteGates]], classes: Sequence[str], path: str | Path | None) -> Figure:
    figure = new_figure(11, 0.5 + 2.4 * len(stages))
    axes = figure.subplots(len(stages), 2, squeeze=False, width_ratios=(1, 1.5))
    for (left, right), stage in zip(axes, stages, strict=True):
        _plot_stage(left, stage)
        _plot_site(right, stage[-1], classes)
    if path is not None:
        save_figure(figure, path)
    return figure


def _plot_stage(axes: Axes, stage: list[SiteGates]) -> None:
    axes.axhline(1.0, **_ONE)
    means = [site.mean.numpy() for site in stage]
    boxes = axes.boxplot(means, whis=(0, 100), widths=0.6, patch_artist=True, medianprops={"color": "#c2410c"})
    for box in boxes["boxes"]:
        box.set(facecolor="#ffe4c7", edgecolor="#64748b")
    names = [site.name.removeprefix("features.") for site in stage]
    axes.set_xticks(range(1, len(stage) + 1), names)
    axes.tick_params(axis="x", labelsize=8, rotation=45 if len(stage) * max(map(len, names)) > 50 else 0)
    axes.set_title(f"{stage[0].size}: gates of the channels, mean over inputs", fontsize=9)
    axes.set_ylabel("gate")
    _give_room(axes)


def _plot_site(axes: Axes, site: SiteGates, classes: Sequence[str]) -> None:
    order = site.mean.argsort()
    mean, std, channels = site.mean[order].numpy(), site.std[order].numpy(), range(len(order))
    axes.axhline(1.0, **_ONE)
    style: dict[str, Any] = {"color": "#cbd5e1", "alpha": 0.6, "linewidth": 0}
    axes.fill_between(channels, mean - std, mean + std, label="± std over inputs", **style)
    for label in sorted(site.class_means)[:MOST_CLASSES]:
        name = as_written(classes[label]) if 0 <= label < len(classes) else f"class {label}"
        axes.plot(channels, site.class_means[label][order].numpy(), linewidth=0.9, alpha=0.9, label=name)
    axes.plot(channels, mean, color="#1e293b", linewidth=1.4, label="all")
    axes.set_title(f"{site.name}: gate by channel, sorted by mean", fontsize=9)
    axes.set_xlabel("channel", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _give_room(axes)


def _give_room(axes: Axes) -> None:
    """Show a range of at least 0.1, so that a plot of gates that are all about 1 does not show rounding errors."""
    low, high = axes.get_ylim()
    if high - low < 0.1:
        middle = (low + high) / 2
        axes.set_ylim(middle - 0.05, middle + 0.05)


def plot_gates(epochs: Mapping[int, Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Plot how the gates moved in training. For each epoch, the panel of a site shows the range over its channels, the
    middle half of them and their median; its title shows how much the gates vary between inputs in the last epoch.

    Args:
        epochs: the result of ``GateLogger.summary`` for each epoch, by its number. Each ``SiteGates`` may be replaced
            by its ``quartiles()``, as in the ``"gates"`` of the rows that ``finetune`` writes to ``metrics.jsonl``.
        path: where to save the figure, in any format that matplotlib supports; None to not save it.

    Raises:
        RetrofitError: If no epoch has gates, matplotlib is not installed, or the figure can't be written.
    """
    rows = {
        epoch: {path: seen.quartiles() if isinstance(seen, SiteGates) else seen for path, seen in row.items()}
        for epoch, row in sorted(epochs.items())
    }
    sites = list(dict.fromkeys(path for row in rows.values() for path in row))
    if not sites:
        raise RetrofitError("there are no gates to draw: none of the epochs has any")
    columns = min(4, len(sites))
    lines = -(-len(sites) // columns)
    figure = new_figure(2.7 * columns + 0.6, 2.2 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, site in zip(grid.flat, sites, strict=False):
        _plot_epochs(axes, site, {epoch: row[site] for epoch, row in rows.items() if site in row})
    for axes in grid.flat[len(sites) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("mean gate of each channel", fontsize=9)
    title = "± is the variation between inputs, in the last epoch"
    style: dict[str, Any] = {"ncols": 3, "fontsize": 8, "frameon": False, "title": title, "title_fontsize": 8}
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper center", **style)
    if path is not None:
        save_figure(figure, path)
    return figure


def _plot_epochs(axes: Axes, site: str, rows: Mapping[int, Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    at = list(rows)
    least, lower, middle, upper, most = zip(*(row["channels"] for row in rows.values()), strict=True)
    axes.axhline(1.0, **_ONE)
    axes.fill_between(at, least, most, color="#ffe4c7", linewidth=0, label="all channels")
    axes.fill_between(at, lower, upper, color="#fdba74", linewidth=0, label="middle half")
    axes.plot(at, middle, color="#c2410c", marker=".", markersize=4, linewidth=1.2, label="median")
    axes.set_title(f"{site.removesuffix('.se_attention')}   ± {rows[at[-1]]['variation']:.3f}", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=7)
