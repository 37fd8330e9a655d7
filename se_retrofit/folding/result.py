"""The result of folding, site by site: as a table and plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..tables import aligned, few


@dataclass(frozen=True)
class FoldedSite:
    """The result of folding for one site.

    Attributes:
        path, block: paths of the SE module and of its block.
        channels: number of channels that it scales.
        spread: the standard deviation of a channel's gate between inputs, averaged over the channels.
        between: fraction of the gates' variance that is between inputs, from 0 to 1; the rest is between channels.
        effect: the change of the outputs if only this site has constant gates, relative to the norm of the outputs.
        verdict: ``"folded"``, ``"factor"`` (the gates are constant now, but could not be folded: a module with one
            factor per channel remains) or ``"kept"``.
        kept_by: the limit because of which it was kept, ``"outputs"`` (their change) or ``"accuracy"``; otherwise None.
        into: the parameters that the gates were folded into.
    """

    path: str
    block: str
    channels: int
    spread: float
    between: float
    effect: float
    verdict: str
    kept_by: str | None = None
    into: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoldReport:
    """The report of ``fold_se``; ``str`` is a table.

    Attributes:
        sites: the sites that the data reached, in the order of the plan.
        missed: paths of SE modules that the data never reached; they are kept.
        inputs: number of inputs that were run.
        tolerance: the largest change of the outputs that was allowed.
        change: the actual change of the outputs, relative to their norm.
        accuracy_before, accuracy_after: accuracy on the data, from 0 to 1; None without labels.
    """

    sites: tuple[FoldedSite, ...]
    missed: tuple[str, ...]
    inputs: int
    tolerance: float
    change: float
    accuracy_before: float | None
    accuracy_after: float | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as plain data, so that a completely folded network can be loaded without this package."""
        return dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldReport:
        return self

    @property
    def folded(self) -> tuple[str, ...]:
        """Paths of the SE modules that were removed."""
        return tuple(site.path for site in self.sites if site.verdict == "folded")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [["site", "channels", "spread", "between inputs", "effect", "verdict"]]
        for site in self.sites:
            into = f" into {few(site.into, 2)}" if site.into else ""
            words = {"folded": f"folded{into}", "factor": "a constant factor stays", "kept": f"kept by {site.kept_by}"}
            figures = (f"{site.channels:,}", f"{site.spread:.4f}", f"{site.between:.1%}", f"{site.effect:.2e}")
            rows.append([site.path, *figures, words[site.verdict]])
        counts = Counter(site.verdict for site in self.sites)
        lines = [
            *aligned(rows, rule=True),
            f"{counts['folded']} of {len(self.sites)} sites folded, {counts['factor']} left as constant factors, "
            f"{counts['kept']} kept; over {self.inputs:,} inputs",
            f"change of the outputs: {self.change:.2e} (allowed: {self.tolerance:g})",
        ]
        if self.accuracy_before is not None and self.accuracy_after is not None:
            lines.append(f"accuracy: {self.accuracy_before:.2%} before, {self.accuracy_after:.2%} after")
        if self.missed:
            lines.append(f"never called on these inputs: {', '.join(self.missed)}")
        return "\n".join(lines)
