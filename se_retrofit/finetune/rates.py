"""The learning-rate finder: a short training on a copy, at rates that rise from step to step."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..errors import RetrofitError, brief
from ..paths import save_figure
from .config import FinetuneConfig
from .criteria import Criterion
from .data import Batch
from .learning import se_pace
from .run import Run
from .setup import Job, check, started
from .train import begin_epoch, update, windows

__all__ = ["LearningRates", "find_lr"]

FEWEST_STEPS = 10
DIVERGED = 4.0  # times the lowest loss: the ramp ends there
MEMORY = 0.8  # of the running mean by which that is seen
LEAST_FALL = 0.02  # of the loss, for a suggestion


@dataclass(frozen=True)
class LearningRates:
    """How the loss went while the learning rate rose.

    Attributes:
        rates: the learning rate of each step, as the config's ``lr``: SE and the head had theirs times their scales.
        losses: the training loss of each step, before its update.
        smoothed: the same, averaged over the steps around each.
        suggestion: the rate at which the loss fell fastest; None where it hardly fell.
        diverged: whether the ramp ended early, because the loss rose far above its lowest value or was no longer finite.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool

    def __str__(self) -> str:
        tried = f"up to {self.rates[-1]:.2e}{' (the loss diverged)' if self.diverged else ''}"
        if self.suggestion is None:
            return f"no suggestion: the loss hardly fell {tried}"
        at = self.rates.index(self.suggestion)
        fell = f"from {self.losses[0]:.4f} to {self.losses[at]:.4f}"
        return f"suggested lr: {self.suggestion:.2e}, where the loss falls fastest, {fell} there; tried {tried}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "suggestion": self.suggestion, "diverged": self.diverged, "rates": list(self.rates), "losses": list(self.losses),
            "smoothed": list(self.smoothed),
        }  # fmt: skip

    def plot(self, file: str | Path) -> Path:
        """The loss over the learning rate as a picture, without the part in which it is far above where it began.

        Raises:
            RetrofitError: the file can't be written.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, alpha=0.3, label="each step")
        axes.plot(self.rates, self.smoothed, label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="black", linestyle=":", label=f"suggestion {self.suggestion:.1e}")
        low, high, last = self._that_matter()
        axes.set_ylim(low, high)
        axes.set_xlim(self.rates[0], self.rates[last])
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, file)
        return Path(file)

    def _that_matter(self) -> tuple[float, float, int]:
        """The lowest and the highest loss that are drawn, and the last step: where the smoothed loss leaves the picture for good."""
        bottom = int(np.argmin(self.smoothed))
        top = max(self.smoothed[: bottom + 1])
        margin = max(0.25 * (top - self.smoothed[bottom]), 0.02 * abs(top), 1e-9)
        low, high = self.smoothed[bottom] - margin, top + margin
        inside = [step for step, loss in enumerate(self.smoothed) if loss <= high]
        return low, high, min(inside[-1] + 1, len(self.rates) - 1)


def find_lr(
    model: nn.Module,
    train_data: Any,
    *,
    config: FinetuneConfig | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
    criterion: Criterion | None = None,
    teacher: nn.Module | None = None,
    distillation: tuple[float, float] = (0.5, 4.0),
) -> LearningRates:
    """Train a copy of the network for some steps, each at a higher learning rate than the one before (Smith, "Cyclical Learning
    Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186), by the recipe of ``finetune`` in its first epoch.
    The suggestion is meant for the peak of the schedule, ``config.lr``.

    Args:
        model: the network; it is copied and not changed.
        config: the recipe; its ``lr``, schedule and average of weights play no part.
        lowest, highest: the rates of the first step and of the last, where the loss does not diverge before.
        steps: how many there are, each an update; short data is passed through several times.
        train_data, criterion, teacher, distillation: as for ``finetune``.

    Raises:
        RetrofitError: the rates don't rise; there are too few steps; config, data and network don't fit together.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import timm
        >>> from se_retrofit.finetune import FinetuneConfig, find_lr, load_data
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> config = FinetuneConfig(batch_size=16)
        >>> found = find_lr(model, load_data("digits", image_size=8).val, config=config, steps=20)
        >>> config = config.replace(lr=found.suggestion or config.lr)
    """
    if not (0 < lowest < highest and math.isfinite(highest)):
        raise RetrofitError(f"find_lr needs 0 < lowest < highest, got lowest={brief(lowest)}, highest={brief(highest)}")
    if steps < FEWEST_STEPS:
        raise RetrofitError(f"find_lr needs steps={FEWEST_STEPS} at least, got {brief(steps)}")
    config = FinetuneConfig() if config is None else config
    # The rates are set here, step by step; nothing is averaged, tracked or written, and no epoch is the best
    recipe = config.replace(schedule="none", schedule_options={}, ema_decay=None, trackers=(), patience=None)
    job = Job(
        model, train_data, None, recipe, quiet=True, criterion=criterion, teacher=teacher,
        distillation=distillation,
    )  # fmt: skip
    check(job)
    with started(replace(job, model=copy.deepcopy(model))) as run:
        begin_epoch(run, 0)
        ramp = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
        losses, diverged = losses_on(run, ramp)
    return learning_rates(ramp[: len(losses)], losses, diverged)


def losses_on(run: Run, ramp: list[float]) -> tuple[list[float], bool]:
    """The loss at each rate, as far as it stays finite and does not diverge, and whether it did."""
    losses: list[float] = []
    mean = lowest = math.inf
    for rate, batches in zip(ramp, all_windows(run), strict=False):
        for group in run.learning.optimizer.param_groups:
            # SE's pace depends on the rate, and lr_scale has that of the recipe's
            scale = group["lr_scale"] / se_pace(group["fan_in"], run.config.lr)
            group["lr"] = rate * scale * se_pace(group["fan_in"], rate)
        loss, correct, seen, broken = run.accelerator.reduce(update(run, batches), "sum").tolist()
        if broken:
            run.check_losses([(loss, correct, seen, broken)])
        if not math.isfinite(loss):
            return losses, True
        losses.append(loss / seen)
        mean = losses[-1] if len(losses) == 1 else MEMORY * mean + (1 - MEMORY) * losses[-1]
        lowest = min(lowest, mean)
        if mean > DIVERGED * lowest:
            return losses, True
    return losses, False


def all_windows(run: Run) -> Iterator[list[Batch]]:
    """The batches of each update, epoch after epoch, without an end."""
    for epoch in itertools.count():
        yield from windows(run.train.batches(epoch), run.config.grad_accum_steps)


def learning_rates(rates: list[float], losses: list[float], diverged: bool) -> LearningRates:
    """The losses smoothed, and the rate at which they fall fastest."""
    if len(losses) < FEWEST_STEPS:
        raise RetrofitError(
            f"the loss diverged after {len(losses)} steps, at a learning rate of "
            f"{rates[-1] if rates else 0:.2e}: begin lower (lowest=...), or look at the data and the loss"
        )
    smoothed = smooth(np.array(losses))
    bottom = int(np.argmin(smoothed))
    top = int(np.argmax(smoothed[: bottom + 1]))
    suggestion = None
    if smoothed[top] - smoothed[bottom] > LEAST_FALL * abs(smoothed[top]):
        slopes = np.gradient(smoothed, np.log(rates))
        suggestion = rates[top + int(slopes[top : bottom + 1].argmin())]
    return LearningRates(tuple(rates), tuple(losses), tuple(smoothed.tolist()), suggestion, diverged)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Each loss as a mean over those around it. A running mean would lag behind, and the suggestion with it."""
    at = np.arange(len(losses))
    width = max(len(losses) / 40, 1.0)
    weights = np.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
    return np.asarray(weights @ losses / weights.sum(1))
