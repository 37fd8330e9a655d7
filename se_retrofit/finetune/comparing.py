"""Does SE help? Compare fine-tunes with and without it, paired over seeds and validation images."""

from __future__ import annotations

import copy
import json
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from ..attention import ATTENTIONS
from ..errors import RetrofitError, check_positive
from ..paths import new_figure, save_figure
from ..retrofit import add_se, has_se
from ..saving.atomic import write_text
from ..tables import aligned, as_html, counted
from .config import FinetuneConfig
from .engine import processes
from .evaluation import evaluate
from .randomness import EPOCH, kept_randomness, seed_all
from .train import finetune

ARMS = {  # in addition to the names of all other attentions
    "plain": "without SE",
    "se": "with SE",
    "static": "a learned factor for each channel, no squeeze",
    "sigmoid": "with SE, the paper's gate",
    "norms": "without SE, its norms and head alone",
    "head": "without SE, its head alone",
}
NAMES = {
    "se": "SE", "sigmoid": "SE with the paper's gate", "static": "The static factor",
    "norms": "Training the norms and the head alone", "head": "Training the head alone",
}  # fmt: skip
PARTS = {"norms": "norms+head", "head": "head"}  # what these arms train
FEWEST_SEEDS = 3  # below this there is no verdict
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Arm:
    """One of the networks that are compared, with the results of its runs.

    Attributes:
        accuracies: the best validation accuracy of each seed.
        last_accuracies: the validation accuracy of each seed after the last epoch.
        step_seconds: median over the seeds of the median time of an update; None if the runs are too short for it.
        parameters, trained: the number of the network's parameters, and of those that were trained.
        right: which validation images were classified correctly in the best epoch, a bool tensor (seeds, images).
    """

    accuracies: list[float]
    last_accuracies: list[float]
    step_seconds: float | None
    parameters: int
    trained: int
    right: Tensor = field(repr=False, compare=False)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything except ``right`` as plain data."""
        own = {name: value for name, value in vars(self).items() if name != "right"}
        return {**own, "mean": self.mean, "spread": self.spread}


@dataclass(frozen=True)
class Contrast:
    """The difference in accuracy between two arms, on the same validation images, seed by seed.

    Attributes:
        name, other: the two arms.
        differences: accuracy of ``name`` minus accuracy of ``other``, one for each seed.
        image_variance: variance of the mean difference that is due to the sampling of the validation images.
        images: number of validation images.
    """

    name: str
    other: str
    differences: list[float]
    image_variance: float
    images: int

    @classmethod
    def of(cls, name: str, arm: Arm, other: str, base: Arm) -> Contrast:
        """Compute the contrast of two arms that had the same seeds and images."""
        per_image = (arm.right.double() - base.right.double()).mean(0)
        images = len(per_image)
        variance = float(per_image.var()) / images if images > 1 else 0.0
        differences = [a - b for a, b in zip(arm.accuracies, base.accuracies, strict=True)]
        return cls(name, other, differences, variance, images)

    @property
    def difference(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the difference, over seeds and images; None for a single seed.

        Seeds and images are both samples, so their variances are added. The quantile is that of Student's distribution
        for the number of seeds. If all seeds give the same difference, the variance of the images remains.
        """
        n = len(self.differences)
        if n < 2:
            return None
        error = (statistics.variance(self.differences) / n + self.image_variance) ** 0.5
        margin = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
        return self.difference - margin, self.difference + margin

    @property
    def verdict(self) -> str:
        """The result in one plain sentence."""
        name = NAMES.get(self.name, self.name.upper())
        against = {"plain": "", "static": " than the static factor"}[self.other]
        n = len(self.differences)
        if self.interval is None:
            return "One seed tells nothing about the noise: run several."
        if n < FEWEST_SEEDS:
            return f"{n} seeds are too few for a verdict: run at least {FEWEST_SEEDS}."
        if abs(self.difference) * self.images < 1:
            return "The difference is worth less than one validation image."
        low, high = self.interval
        if low <= 0 <= high:
            return f"The difference is within the noise: the {CONFIDENCE:.0%} interval includes zero."
        better, side = ("better", "above") if low > 0 else ("worse", "below")
        return f"{name} is {better}{against}: the whole {CONFIDENCE:.0%} interval lies {side} zero."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        names = ("name", "other", "differences", "difference", "images", "interval", "verdict")
        return {**{name: getattr(self, name) for name in names}, "confidence": CONFIDENCE}

    def __str__(self) -> str:
        between = ""
        if self.interval is not None:
            low, high = self.interval
            between = f", {CONFIDENCE:.0%} interval {100 * low:+.2f} to {100 * high:+.2f}"
        return (
            f"{self.name} - {self.other}: {100 * self.difference:+.2f} points{between} "
            f"({counted(len(self.differences), 'seed')}, {self.images:,} images, paired)\n{self.verdict}"
        )


@dataclass(frozen=True)
class Comparison:
    """The results of a network without and with SE, trained by the same recipe, seed by seed.

    Attributes:
        arms: the networks by the names that were given to ``compare``.
        seeds: the seeds of the runs.
    """

    arms: dict[str, Arm]
    seeds: list[int]

    @property
    def contrasts(self) -> list[Contrast]:
        """Each arm against the plain network, and against the static factor if that was run."""
        bases = {"plain": ("plain",), "static": ("plain", "static")}
        return [
            Contrast.of(name, self.arms[name], other, self.arms[other])
            for other, without in bases.items()
            for name in self.arms
            if other in self.arms and name not in without
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON can hold."""
        return {
            "seeds": self.seeds,
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "contrasts": [contrast.to_dict() for contrast in self.contrasts],
        }

    def _rows(self) -> list[tuple[str, ...]]:
        columns = ("mean accuracy %", "ms per step", "parameters", "trained")
        rows = [("", *(f"seed {seed}, accuracy %" for seed in self.seeds), *columns)]
        for name, arm in self.arms.items():
            spread = "" if arm.spread is None else f" ± {100 * arm.spread:.2f}"
            pace = "-" if arm.step_seconds is None else f"{1000 * arm.step_seconds:.1f}"
            each = (f"{100 * accuracy:.2f}" for accuracy in arm.accuracies)
            rows.append((name, *each, f"{100 * arm.mean:.2f}{spread}", pace, f"{arm.parameters:,}", f"{arm.trained:,}"))
        return list(zip(*rows, strict=True))

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(aligned(self._rows(), left=1)), *map(str, self.contrasts)])

    def plot(self, file: str | Path) -> Path:
        """Plot the differences between the arms with their intervals, and the differences of the single seeds.

        Raises:
            RetrofitError: If the file can't be written.
        """
        contrasts = self.contrasts
        figure = new_figure(7, 1.2 + 0.5 * len(contrasts))
        axes = figure.subplots()
        axes.axvline(0.0, color="gray", linewidth=0.8)
        for row, contrast in enumerate(contrasts):
            points = [100 * difference for difference in contrast.differences]
            axes.plot(points, [row + 0.22] * len(points), "o", color="tab:gray", alpha=0.6, markersize=4)
            interval = contrast.interval or (contrast.difference, contrast.difference)
            axes.plot([100 * end for end in interval], [row, row], color="tab:blue", linewidth=2.5)
            axes.plot([100 * contrast.difference], [row], "D", color="tab:blue")
        axes.set_yticks(range(len(contrasts)), [f"{contrast.name} - {contrast.other}" for contrast in contrasts])
        axes.set_ylim(len(contrasts) - 0.5, -0.5)
        interval_told = f" with {CONFIDENCE:.0%} interval" if len(self.seeds) > 1 else ""
        axes.set_xlabel(f"accuracy, percentage points: mean{interval_told}, and each seed (gray)")
        axes.grid(axis="x", alpha=0.3)
        return save_figure(figure, file)

    def _repr_html_(self) -> str:
        return as_html(self._rows(), left=1, below=map(str, self.contrasts))


def compare(
    model: nn.Module | Callable[[], nn.Module],
    train_data: Any,
    val_data: Any,
    *,
    config: FinetuneConfig | None = None,
    seeds: int = 3,
    se_options: dict[str, Any] | None = None,
    arms: Sequence[str] = ("plain", "se", "static"),
    output_dir: str | Path | None = None,
    quiet: bool = False,
    stop: threading.Event | None = None,
) -> Comparison:
    """Fine-tune a network without and with SE by the same recipe, and compare the results over several seeds.

    For each seed, all networks start from the same weights, see the same images in the same order, and take the same
    number of steps. They are compared seed by seed, which removes the variation between seeds.

    Args:
        model: the bare network, copied for each run; or a function that builds it, called with each seed set.
        train_data, val_data: as for ``finetune``. Accuracies are those of the best epoch, and so slightly high for all.
        config: the recipe; its seed is the first one. With ``trainable="se+head"``, the plain network trains its head.
        seeds: number of seeds.
        se_options: arguments for ``add_se``, such as ``{"reduction": 16}``.
        arms: ``"plain"`` and one or more of the attentions ``"se"``, ``"eca"``, ``"cbam"`` and ``"static"``,
            ``"sigmoid"`` (SE with the paper's gate), ``"norms"`` (no SE, only norms and head trained) and ``"head"``.
        output_dir: folder for ``comparison.json``, ``comparison.png`` and the runs, which resume if it is used again.
        quiet, stop: as for ``finetune``.

    Raises:
        RetrofitError: If the network can't be retrofitted, or if ``finetune`` raises it.
        TypeError: If an argument is of the wrong type.
    """
    config = FinetuneConfig() if config is None else config
    _check_arguments(config, seeds, arms, val_data)
    main = processes()[0] == 0  # of several processes one prints and writes
    numbers = list(range(config.seed, config.seed + seeds))
    output = None if output_dir is None else Path(output_dir)
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in numbers:
        with kept_randomness():
            seed_all(seed, EPOCH)
            bare = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
            networks = {name: _network(name, bare, se_options or {}) for name in arms}
        for name, network in networks.items():
            if not quiet and main:
                print(f"seed {seed}, {name}: {ARMS.get(name, f'with {name.upper()}')}", flush=True)
            recipe = _recipe(name, config).replace(seed=seed)
            result = finetune(
                network, train_data, val_data, config=recipe, quiet=quiet, stop=stop,
                output_dir=None if output is None else output / f"{name}-{seed}", resume=output is not None,
            )  # fmt: skip
            right = evaluate(result.model, val_data, config=recipe).right
            outcomes[name].append({**vars(result), "model": None, "right": right})  # the weights take much memory
    comparison = Comparison({name: _arm(outcomes[name]) for name in arms}, numbers)
    if output is not None and main:
        write_text(output / "comparison.json", json.dumps(comparison.to_dict(), indent=2) + "\n")
        comparison.plot(output / "comparison.png")
    return comparison


def _check_arguments(config: FinetuneConfig, seeds: int, arms: Sequence[str], val_data: Any) -> None:
    check_positive("seeds", seeds)
    if config.trainable not in ("all", "se+head"):
        raise RetrofitError(
            f'trainable="{config.trainable}" trains nothing in some of the networks; compare with "all" or "se+head" '
            "(the arms norms and head have their own)"
        )
    known = list(dict.fromkeys([*ARMS, *ATTENTIONS]))
    unknown = [name for name in arms if name not in known]
    if unknown or "plain" not in arms or len(set(arms)) < max(2, len(arms)):
        raise RetrofitError(
            f"arms must be 'plain' and one or more of {', '.join(known[1:])}, each once, got {list(arms)}"
        )
    if val_data is None:
        raise RetrofitError("compare needs validation data")


def _network(name: str, bare: nn.Module, se_options: dict[str, Any]) -> nn.Module:
    if has_se(bare):
        raise RetrofitError("compare adds SE itself, and the network has it already: give the one without SE")
    if name == "plain" or name in PARTS:
        return copy.deepcopy(bare)
    if name == "sigmoid":
        return add_se(bare, **{**se_options, "attention": "se", "gate": "sigmoid"})
    gate = {} if name == "se" else {"gate": "identity"}  # the only gate of the others
    return add_se(bare, **{**se_options, "attention": name, **gate})


def _recipe(name: str, config: FinetuneConfig) -> FinetuneConfig:
    if name == "plain" and config.trainable != "all":
        name = "head"
    return config.replace(trainable=PARTS.get(name, config.trainable))


def _arm(outcomes: list[dict[str, Any]]) -> Arm:
    times = [found["step_seconds"] for found in outcomes if found["step_seconds"] is not None]
    return Arm(
        accuracies=[float(found["best_accuracy"] or 0.0) for found in outcomes],
        last_accuracies=[float(found["history"][-1]["val_accuracy"]) for found in outcomes],
        step_seconds=statistics.median(times) if times else None,
        parameters=outcomes[0]["parameters"],
        trained=outcomes[0]["trained_parameters"],
        right=torch.stack([found["right"] for found in outcomes]),
    )
