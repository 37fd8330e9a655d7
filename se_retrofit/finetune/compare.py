"""Does SE help? The same recipe with and without it, paired over seeds and validation images."""

from __future__ import annotations

import copy
import json
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from ..attention import ATTENTIONS
from ..errors import RetrofitError, brief
from ..retrofit import add_se
from ..saving.atomic import replaced_file
from ..tables import aligned, as_html
from .config import FinetuneConfig
from .evaluation import evaluate
from .randomness import EPOCH, kept_randomness, seed_all
from .result import FinetuneResult
from .train import finetune

__all__ = ["Arm", "Comparison", "Contrast", "compare"]


ARMS = {  # beside any other name of an attention
    "plain": "without SE",
    "se": "with SE",
    "static": "a learned factor for each channel, no squeeze",
    "sigmoid": "with SE, the paper's gate",
}
NAMES = {"se": "SE", "sigmoid": "SE with the paper's gate", "static": "The static factor"}
FEWEST_SEEDS = 3  # for a verdict


@dataclass(frozen=True)
class Arm:
    """One of the networks that are compared: what each seed's run came to.

    Attributes:
        accuracies: best validation accuracy, one for each seed.
        last_accuracies: validation accuracy after the last epoch.
        step_seconds: median over the seeds of the median time of an update; None for runs too short to tell.
        parameters: of the network.
        right: which validation images were classified correctly in the best epoch, a bool tensor (seeds, images).
    """

    accuracies: list[float]
    last_accuracies: list[float]
    step_seconds: float | None
    parameters: int
    right: Tensor = field(repr=False, compare=False)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """All but ``right`` as plain data."""
        return {
            "accuracies": self.accuracies,
            "last_accuracies": self.last_accuracies,
            "step_seconds": self.step_seconds,
            "parameters": self.parameters,
            "mean": self.mean,
            "spread": self.spread,
        }


@dataclass(frozen=True)
class Contrast:
    """The difference in accuracy between two arms, on the same validation images, seed by seed.

    Attributes:
        name, other: the two arms.
        differences: accuracy of ``name`` less accuracy of ``other``, one for each seed.
        image_variance: of the mean difference, for that other validation images might have been drawn.
        images: how many validation images there are.
        confidence: of ``interval``.
    """

    name: str
    other: str
    differences: list[float]
    image_variance: float
    images: int
    confidence: float = 0.95

    @classmethod
    def of(cls, name: str, arm: Arm, other: str, base: Arm) -> Contrast:
        """The contrast of two arms that saw the same seeds and images."""
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
        """Confidence interval of the difference, over seeds and images; None for a single seed.

        Seeds and images are both samples, and their variances add up. The quantile is Student's, for the number of
        seeds. Seeds that all give the same difference leave the variance of the images.
        """
        n = len(self.differences)
        if n < 2:
            return None
        error = (statistics.variance(self.differences) / n + self.image_variance) ** 0.5
        margin = float(student.ppf((1 + self.confidence) / 2, n - 1)) * error
        return self.difference - margin, self.difference + margin

    @property
    def verdict(self) -> str:
        """One plain sentence."""
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
        if low > 0:
            return f"{name} is better{against}: the whole {self.confidence:.0%} interval lies above zero."
        if high < 0:
            return f"{name} is worse{against}: the whole {self.confidence:.0%} interval lies below zero."
        return f"The difference is within the noise: the {self.confidence:.0%} interval includes zero."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "name": self.name,
            "other": self.other,
            "differences": self.differences,
            "difference": self.difference,
            "images": self.images,
            "confidence": self.confidence,
            "interval": self.interval,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        between = ""
        if self.interval is not None:
            low, high = self.interval
            between = f", {self.confidence:.0%} interval {100 * low:+.2f} to {100 * high:+.2f}"
        return (
            f"{self.name} - {self.other}: {100 * self.difference:+.2f} points{between} "
            f"({len(self.differences)} seeds, {self.images:,} images, paired)\n{self.verdict}"
        )


@dataclass(frozen=True)
class Comparison:
    """A network without and with SE, after the same recipe, seed by seed.

    Attributes:
        arms: the networks by name: ``"plain"``, ``"se"`` and other attentions, ``"sigmoid"``.
        seeds: of the runs.
    """

    arms: dict[str, Arm]
    seeds: list[int]

    @property
    def contrasts(self) -> list[Contrast]:
        """Each arm against the plain network, and against the static factor where that was run."""
        pairs = [(name, "plain") for name in self.arms if name != "plain"]
        if "static" in self.arms:
            pairs += [(name, "static") for name in self.arms if name not in ("plain", "static")]
        return [Contrast.of(name, self.arms[name], other, self.arms[other]) for name, other in pairs]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for JSON."""
        return {
            "seeds": self.seeds,
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
            "contrasts": [contrast.to_dict() for contrast in self.contrasts],
        }

    def _rows(self) -> list[list[str]]:
        def spread(arm: Arm) -> str:
            return "" if arm.spread is None else f" ± {100 * arm.spread:.2f}"

        def milliseconds(arm: Arm) -> str:
            return "-" if arm.step_seconds is None else f"{1000 * arm.step_seconds:.1f}"

        arms = list(self.arms.values())
        rows: list[list[str]] = [["", *self.arms]]
        for number, seed in enumerate(self.seeds):
            rows.append([f"seed {seed}, accuracy %", *(f"{100 * arm.accuracies[number]:.2f}" for arm in arms)])
        rows += [
            ["mean accuracy %", *(f"{100 * arm.mean:.2f}{spread(arm)}" for arm in arms)],
            ["ms per step", *(milliseconds(arm) for arm in arms)],
            ["parameters", *(f"{arm.parameters:,}" for arm in arms)],
        ]
        return rows

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(aligned(self._rows(), left=1)), *map(str, self.contrasts)])

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
    """Fine-tune a network without and with SE, by the same recipe, with the same seeds.

    For each seed, all networks start from the same weights, see the same images in the same order, and take the same number
    of steps; so they are compared seed by seed, which takes out what varies between seeds.

    Args:
        model: the bare network, copied for each run; or a function that makes one. It is called with torch's
            generator seeded, so that each seed has its own first weights.
        train_data, val_data: as for ``finetune``. Accuracy is the best epoch's, on ``val_data``, and so a little
            high, for all.
        config: the recipe; its seed is the first one.
        seeds: how many.
        se_options: for ``add_se``, such as ``{"reduction": 16}``.
        arms: the networks to compare: ``"plain"`` and one or more of the attentions ``"se"``, ``"eca"``, ``"cbam"`` and
            ``"static"`` (a learned factor for each channel in the same places, which tells SE's squeeze from the mere
            parameters), and ``"sigmoid"`` (SE with the paper's gate, which is no identity at first).
        output_dir: folder for ``comparison.json`` and the runs; None writes nothing.
        quiet: print nothing.
        stop: as for ``finetune``; a comparison with an ``output_dir`` goes on when it is called again.

    Raises:
        RetrofitError: the network can't be retrofitted, or ``finetune`` raises it.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import timm
        >>> from se_retrofit.finetune import FinetuneConfig, compare, load_data
        >>> data = load_data("digits", image_size=8)
        >>> make = lambda: timm.create_model("test_resnet", num_classes=10)
        >>> config = FinetuneConfig(epochs=1, batch_size=120)
        >>> comparison = compare(make, data.val, data.val, config=config, seeds=2, arms=("plain", "se"), quiet=True)
        >>> len(comparison.contrasts[0].differences)
        2
    """
    config = FinetuneConfig() if config is None else config
    _check_arguments(config, seeds, arms, val_data)
    numbers = list(range(config.seed, config.seed + seeds))
    output = None if output_dir is None else Path(output_dir)
    runs: dict[str, list[FinetuneResult]] = {name: [] for name in arms}
    answers: dict[str, list[Tensor]] = {name: [] for name in arms}
    for seed in numbers:
        with kept_randomness():
            seed_all(seed, EPOCH)
            bare = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
            networks = {name: _network(name, bare, se_options or {}) for name in arms}
        for name, network in networks.items():
            if not quiet:
                print(f"seed {seed}, {name}: {ARMS.get(name, f'with {name.upper()}')}", flush=True)
            recipe = config.replace(seed=seed)
            result = finetune(
                network,
                train_data,
                val_data,
                config=recipe,
                output_dir=None if output is None else output / f"{name}-{seed}",
                resume=output is not None,  # a comparison takes long: rerunning it resumes
                quiet=quiet,
                stop=stop,
            )
            answers[name].append(evaluate(result.model, val_data, config=recipe).right)
            # the weights are on the disk or not wanted, and the memory is
            runs[name].append(replace(result, model=nn.Identity()))
    comparison = Comparison({name: _arm(runs[name], answers[name]) for name in arms}, numbers)
    if output is not None:
        with replaced_file(output / "comparison.json") as fresh:
            fresh.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    return comparison


def _check_arguments(config: FinetuneConfig, seeds: int, arms: Sequence[str], val_data: Any) -> None:
    """Raises where a comparison can't begin."""
    if isinstance(seeds, bool) or not isinstance(seeds, int):
        raise TypeError(f"seeds must be a positive int, got {brief(seeds)}")
    if seeds < 1:
        raise RetrofitError(f"seeds must be at least 1, got {seeds}")
    if config.trainable != "all":
        raise RetrofitError(
            f'a network without SE can\'t be trained with trainable="{config.trainable}"; compare with "all"'
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
    """A copy of the bare network for one arm."""
    if name == "plain":
        return copy.deepcopy(bare)
    if name == "sigmoid":
        return add_se(bare, **{**se_options, "attention": "se", "gate": "sigmoid"})
    gate = {} if name == "se" else {"gate": "identity"}  # the others have no other
    return add_se(bare, **{**se_options, "attention": name, **gate})


def _arm(results: list[FinetuneResult], answers: list[Tensor]) -> Arm:
    times = [r.step_seconds for r in results if r.step_seconds is not None]
    return Arm(
        accuracies=[float(r.best_accuracy or 0.0) for r in results],
        last_accuracies=[float(r.history[-1]["val_accuracy"]) for r in results],
        step_seconds=statistics.median(times) if times else None,
        parameters=results[0].parameters,
        right=torch.stack(answers),
    )
