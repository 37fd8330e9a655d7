"""Does SE pay? The same recipe with and without it, paired over seeds."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student
from torch import nn

from ..atomic import replaced_file
from ..errors import RetrofitError
from ..models import Base
from ..retrofit import add_se
from .config import FinetuneConfig
from .loop import FinetuneResult, finetune
from .randomness import EPOCH, kept_randomness, seed_all

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Arm:
    """One of the two networks: what each seed's run came to.

    Attributes:
        accuracies: best validation accuracy, a seed each.
        last_accuracies: validation accuracy after the last epoch.
        step_seconds: median over the seeds of the median time of an update; None for runs too short to tell.
        parameters: of the network.
    """

    accuracies: list[float]
    last_accuracies: list[float]
    step_seconds: float | None
    parameters: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """A network without and with SE, after the same recipe, seed by seed.

    Attributes:
        plain, se: the two networks.
        seeds: of the runs.
        confidence: of ``interval``.
    """

    plain: Arm
    se: Arm
    seeds: list[int]
    confidence: float = 0.95

    @property
    def differences(self) -> list[float]:
        """Accuracy with SE less accuracy without, a seed each."""
        return [b - a for a, b in zip(self.plain.accuracies, self.se.accuracies, strict=True)]

    @property
    def difference(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Confidence interval of the difference, by the paired t test; None for a single seed."""
        n = len(self.seeds)
        if n < 2:
            return None
        error = statistics.stdev(self.differences) / n**0.5
        margin = float(student.ppf((1 + self.confidence) / 2, n - 1)) * error
        return self.difference - margin, self.difference + margin

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        if self.interval is None:
            return "One seed tells nothing about the noise: run several."
        low, high = self.interval
        if low > 0:
            return f"SE is better: the whole {self.confidence:.0%} interval lies above zero."
        if high < 0:
            return f"SE is worse: the whole {self.confidence:.0%} interval lies below zero."
        return f"The difference is within the noise: the {self.confidence:.0%} interval includes zero."

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for JSON."""
        return {
            "seeds": self.seeds,
            "plain": {**asdict(self.plain), "mean": self.plain.mean, "spread": self.plain.spread},
            "se": {**asdict(self.se), "mean": self.se.mean, "spread": self.se.spread},
            "differences": self.differences,
            "difference": self.difference,
            "confidence": self.confidence,
            "interval": self.interval,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        def spread(arm: Arm) -> str:
            return "" if arm.spread is None else f" ± {100 * arm.spread:.2f}"

        def milliseconds(arm: Arm) -> str:
            return "-" if arm.step_seconds is None else f"{1000 * arm.step_seconds:.1f}"

        rows = [("", "without SE", "with SE")]
        for seed, a, b in zip(self.seeds, self.plain.accuracies, self.se.accuracies, strict=True):
            rows.append((f"seed {seed}, accuracy %", f"{100 * a:.2f}", f"{100 * b:.2f}"))
        rows += [
            (
                "mean accuracy %",
                f"{100 * self.plain.mean:.2f}{spread(self.plain)}",
                f"{100 * self.se.mean:.2f}{spread(self.se)}",
            ),
            ("ms a step", milliseconds(self.plain), milliseconds(self.se)),
            ("parameters", f"{self.plain.parameters:,}", f"{self.se.parameters:,}"),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])]).rstrip()
            for row in rows
        ]
        between = ""
        if self.interval is not None:
            low, high = self.interval
            between = f", {self.confidence:.0%} interval {100 * low:+.2f} to {100 * high:+.2f}"
        lines += [
            "",
            f"difference {100 * self.difference:+.2f} points{between} ({len(self.seeds)} seeds, paired)",
            self.verdict,
        ]
        return "\n".join(lines)


def compare(
    model: nn.Module | Callable[[], nn.Module],
    train_data: Any,
    val_data: Any,
    *,
    config: FinetuneConfig | None = None,
    seeds: int = 3,
    se_options: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    base: Base | None = None,
    quiet: bool = False,
) -> Comparison:
    """Fine-tune a network without and with SE, by the same recipe, with the same seeds.

    For each seed both start from the same weights, see the same images in the same order, and take the same number
    of steps; so their difference is looked at seed by seed, which takes out what the seeds have in common.

    Args:
        model: the bare network, copied for each run; or a function that makes one. It is called with torch's
            generator seeded, so that each seed has its own first weights.
        train_data, val_data: as for ``finetune``. Accuracy is the best epoch's, on ``val_data``, and so a little
            high, for both.
        config: the recipe; its seed is the first one.
        seeds: how many.
        se_options: for ``add_se``, such as ``{"reduction": 16}``.
        output_dir: folder for ``comparison.json`` and the runs; None writes nothing.
        base: as for ``finetune``.
        quiet: print nothing.

    Raises:
        RetrofitError: the network can't be retrofitted, or ``finetune`` raises it.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import timm
        >>> from se_retrofit.finetune import FinetuneConfig, compare, load_data
        >>> data = load_data("digits", image_size=8)
        >>> make = lambda: timm.create_model("resnet10t", num_classes=10)
        >>> config = FinetuneConfig(epochs=1, batch_size=120)
        >>> comparison = compare(make, data.val, data.val, config=config, seeds=2, quiet=True)
        >>> len(comparison.differences)
        2
    """
    config = FinetuneConfig() if config is None else config
    if isinstance(seeds, bool) or not isinstance(seeds, int):
        raise TypeError(f"seeds must be a positive int, got {seeds!r}")
    if seeds < 1:
        raise RetrofitError(f"seeds must be at least 1, got {seeds}")
    if config.train != "all":
        raise RetrofitError(f'a network without SE can\'t be trained with train="{config.train}"; compare with "all"')
    if val_data is None:
        raise RetrofitError("compare needs validation data")
    numbers = list(range(config.seed, config.seed + seeds))
    output = None if output_dir is None else Path(output_dir)
    runs: dict[str, list[FinetuneResult]] = {"plain": [], "se": []}
    for seed in numbers:
        with kept_randomness():
            seed_all(seed, EPOCH)
            if isinstance(model, nn.Module):
                plain = copy.deepcopy(model)
            else:
                plain = model()
            networks = {"plain": plain, "se": add_se(plain, **(se_options or {}))}
        for arm, network in networks.items():
            if not quiet:
                print(f"seed {seed}, {'with' if arm == 'se' else 'without'} SE", flush=True)
            result = finetune(
                network,
                train_data,
                val_data,
                config=config.replace(seed=seed),
                output_dir=None if output is None else output / f"{arm}-{seed}",
                # a comparison takes long: when it is started again it goes on where it was
                resume=output is not None,
                base=base,
                quiet=quiet,
            )
            # the weights are on the disk or not wanted, and the memory is
            runs[arm].append(_without_model(result))
    comparison = Comparison(_arm(runs["plain"]), _arm(runs["se"]), numbers)
    if output is not None:
        with replaced_file(output / "comparison.json") as fresh:
            fresh.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
    return comparison


def _without_model(result: FinetuneResult) -> FinetuneResult:
    return FinetuneResult(**{**result.__dict__, "model": nn.Identity()})


def _arm(results: list[FinetuneResult]) -> Arm:
    times = [r.step_seconds for r in results if r.step_seconds is not None]
    return Arm(
        accuracies=[float(r.best_accuracy or 0.0) for r in results],
        last_accuracies=[float(r.history[-1]["val_accuracy"]) for r in results],
        step_seconds=statistics.median(times) if times else None,
        parameters=results[0].parameters,
    )
