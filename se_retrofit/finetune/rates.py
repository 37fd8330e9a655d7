"""The learning-rate finder: a short training of a copy, with a rate that rises from step to step."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..errors import RetrofitError, brief, check_positive
from ..paths import new_figure, save_figure
from .config import FinetuneConfig
from .criteria import Criterion
from .learning import se_pace
from .run import Run
from .setup import Job, check, started
from .train import begin_epoch, update, windows

FEWEST_STEPS = 10
DIVERGED = 4.0  # the ramp ends at this multiple of the lowest loss
MEMORY = 0.8  # decay of the running mean that is compared with it
LEAST_FALL = 0.02  # relative fall of the loss that a suggestion needs


@dataclass(frozen=True)
class LearningRates:
    """The loss as a function of the rising learning rate.

    Attributes:
        rates: the learning rate of each step, in terms of the config's ``lr``; those of SE and head are scaled from it.
        losses: the training loss of each step, before its update.
        smoothed: the losses, averaged over neighbouring steps.
        suggestion: the rate at which the loss fell fastest; None if it hardly fell.
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
        """Return plain data that JSON can hold."""
        return {
            "suggestion": self.suggestion, "diverged": self.diverged, "rates": list(self.rates), "losses": list(self.losses),
            "smoothed": list(self.smoothed),
        }  # fmt: skip

    def plot(self, file: str | Path) -> Path:
        """Plot the loss over the learning rate, without the part in which it is far above its initial value.

        Raises:
            RetrofitError: If the file can't be written.
        """
        figure = new_figure(6, 3.5)
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
        return save_figure(figure, file)

    def _that_matter(self) -> tuple[float, float, int]:
        """Return the lowest and highest loss to plot, and the last step, from which on the smoothed loss is higher."""
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
    """Find a learning rate by training a copy of the network with a rate that rises from step to step (Smith, "Cyclical
    Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186), as in the first epoch of
    ``finetune``. The suggestion is meant for the peak of the schedule, ``config.lr``.

    Args:
        model: the network; it is copied and not changed.
        config: the recipe; its ``lr``, schedule and average of weights are not used.
        lowest, highest: the rates of the first and the last step, unless the loss diverges before.
        steps: number of steps, each of them an update; short data is repeated.
        train_data, criterion, teacher, distillation: as for ``finetune``.

    Raises:
        RetrofitError: If the rates don't rise, there are too few steps, or config, data and network don't fit together.
        TypeError: If an argument is of the wrong type.

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
    check_positive("steps", steps)
    if steps < FEWEST_STEPS:
        raise RetrofitError(f"find_lr needs steps={FEWEST_STEPS} at least, got {brief(steps)}")
    config = FinetuneConfig() if config is None else config
    # The rates are set here, step by step; nothing is averaged, tracked or written, and there is no best epoch
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
    """Return the loss at each rate until it diverges or is no longer finite, and whether that happened."""
    losses: list[float] = []
    mean = lowest = math.inf
    epochs = (windows(run.train.batches(epoch), run.config.grad_accum_steps) for epoch in itertools.count())
    for rate, batches in zip(ramp, itertools.chain.from_iterable(epochs), strict=False):
        for group in run.learning.optimizer.param_groups:
            # SE's pace depends on the rate, and lr_scale holds the pace for the recipe's rate
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


def learning_rates(rates: list[float], losses: list[float], diverged: bool) -> LearningRates:
    """Smooth the losses, and find the rate at which they fall fastest."""
    if len(losses) < FEWEST_STEPS:
        raise RetrofitError(
            f"the loss diverged after {len(losses)} steps, at a learning rate of "
            f"{rates[-1] if rates else 0:.2e}: start lower (lowest=...), or check the data and the loss"
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
    """Average each loss over its neighbours. A running mean would lag behind, and so would the suggestion."""
    at = np.arange(len(losses))
    width = max(len(losses) / 40, 1.0)
    weights = np.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
    return np.asarray(weights @ losses / weights.sum(1))
