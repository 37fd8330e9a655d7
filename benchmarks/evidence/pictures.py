"""The pictures of docs/evidence.md: intervals by task and network, and what the tasks look like."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from .difference import Difference
from .tasks import Task

SHOWN = 10  # images of a task
CLEAR, UNCLEAR = "#c0392b", "#7f8c8d"


def draw_differences(compared: dict[str, dict[str, Difference]], path: Path) -> None:
    """One panel for each comparison, one interval for each row that it has; those that leave zero out stand out."""
    names = list(dict.fromkeys(name for found in compared.values() for name in found))
    # the same bytes each time, so that a page that did not change shows no difference
    with plt.rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, panels = plt.subplots(
            1,
            len(compared),
            figsize=(3 + 2 * max(len(compared), 3), 1 + 0.27 * len(names)),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for panel, (title, found) in zip(panels[0], compared.items(), strict=True):
            for row, name in enumerate(names):
                if (difference := found.get(name)) is None:
                    continue
                panel.errorbar(
                    difference.mean, row, xerr=difference.half, fmt="D" if name == "all" else "o", markersize=4,
                    capsize=2, color=CLEAR if difference.clear else UNCLEAR,
                )  # fmt: skip
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(title, fontsize=10)
            panel.grid(axis="x", alpha=0.3)
        figure.supxlabel("points of accuracy, 95% interval", fontsize=10)
        panels[0][0].set_yticks(range(len(names)), names, fontsize=8)
        panels[0][0].invert_yaxis()
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_tasks(tasks: dict[str, Task], path: Path) -> None:
    """A row of training images for each task, each titled with its class."""
    figure, axes = plt.subplots(
        len(tasks), SHOWN, figsize=(SHOWN, 1.25 * len(tasks)), squeeze=False, layout="constrained"
    )
    for row, (name, task) in zip(axes, tasks.items(), strict=True):
        shown = task.train.images[:SHOWN].permute(0, 2, 3, 1).numpy()
        low, high = np.quantile(shown, (0.01, 0.99))
        for i, axis in enumerate(row):
            axis.set_axis_off()
            if i < len(shown):
                axis.imshow(((shown[i] - low) / (high - low)).clip(0, 1), interpolation="nearest")
                axis.set_title(int(task.train.labels[i]), fontsize=8, pad=2)
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
