"""What a retrofit put where, and what it costs: a table for people, plain data for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..plan import Skipped, folded
from ..surgery.splice.undo import is_retrofitted
from ..tables import aligned
from .blocks import class_name
from .costs import NOT_CALLED, costs, human
from .graphs import Recorded

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Report", "Row", "report_of"]


@dataclass(frozen=True)
class Row:
    """One site.

    Attributes:
        path: of the SE module.
        block, cls, kind: path of the block, its class before the retrofit, and what it is ("residual", "dense", ...).
        after, before: what in the block gives the value that SE scales, and what takes it.
        shape: of that value, without the batch; () where it is not called on these inputs.
        channels, parameters: of the SE module.
        space: the spatial part of the shape, by which rows are grouped into stages.
        excitation, squeeze_scale: its multiply-adds (see ``costs``); None where it is not called on these inputs.
    """

    path: str
    block: str
    cls: str
    kind: str
    after: str
    before: str
    shape: tuple[int, ...]
    channels: int
    parameters: int
    space: tuple[int, ...]
    excitation: int | None
    squeeze_scale: int | None

    @property
    def multiply_adds(self) -> int | None:
        """All that the SE module costs."""
        return None if self.excitation is None or self.squeeze_scale is None else self.excitation + self.squeeze_scale


@dataclass(frozen=True)
class Report:
    """What a retrofit put where, and what it costs. ``str(report)`` is plain text, ``rich.print(report)`` prints it in colour.

    Attributes:
        model: name of the model's class, before the retrofit.
        rows: one row per site.
        skipped: the blocks that were skipped, with reasons.
        options: the options of the retrofit.
        parameters_before, parameters_after: of the whole network.
        trainable_before, trainable_after: how many of them require a gradient now, without SE's and with them.
        inputs: one input of the network, as its shape: the multiply-adds are for one.
        resized: the shape to which the network itself brings it first, as detectors do; None if it does not.
        multiply_adds_before, multiply_adds_after: of convolutions, linear layers and matrix products; None if unknown.
        squeeze_scale: multiply-adds of SE's squeezes and scales, one for each value, which these leave out.
        what: is inserted, in few words: ``"SE"``.
    """

    model: str
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    options: dict[str, Any]
    parameters_before: int
    parameters_after: int
    trainable_before: int
    trainable_after: int
    inputs: str
    resized: str | None
    multiply_adds_before: int | None
    multiply_adds_after: int | None
    squeeze_scale: int
    what: str = "SE"

    @property
    def title(self) -> str:
        """What is inserted, in full."""
        return "Squeeze-and-Excitation" if self.what == "SE" else f"{self.what} modules"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON."""
        data: dict[str, Any] = json.loads(self.to_json())
        return data

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2)

    def summary(self) -> list[tuple[str, str]]:
        """The totals, as pairs of a heading and a text."""
        share = 100 * self.trainable_after / self.parameters_after if self.parameters_after else 0.0
        of = "" if self.what != "SE" else f", reduction {self.options['reduction']}, gate {self.options['gate']}"
        lines = [
            (f"{self.what} modules", f"{len(self.rows)}{of}"),
            ("parameters", _change(self.parameters_before, self.parameters_after)),
            ("trainable", f"{self.trainable_before:,} -> {self.trainable_after:,} ({share:.2f}% of all)"),
        ]
        if self.multiply_adds_before is None or self.multiply_adds_after is None:
            lines.append(("multiply-adds", "unknown: the network can't be run to its end without data"))
            return lines
        before, layers = self.multiply_adds_before, self.multiply_adds_after
        after = layers + self.squeeze_scale
        change = f"{human(before)} -> {human(after)} (+{percent(after - before, before)}) for one {self.inputs} input"
        return [
            *lines,
            ("multiply-adds", change + (f", resized to {self.resized} by the network" if self.resized else "")),
            ("  of layers alone", f"{human(before)} -> {human(layers)} (+{percent(layers - before, before)})"),
        ]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table as text: its header and its rows."""
        rows = [
            [
                row.block or "(model)",
                row.cls,
                row.kind,
                row.after,
                row.before,
                "x".join(map(str, row.shape)),
                f"{row.channels:,}",
                f"{row.parameters:,}",
                "" if row.multiply_adds is None else f"{row.multiply_adds:,}",
            ]
            for row in self.rows
        ]
        return HEADER, rows

    def __str__(self) -> str:
        header, rows = self.cells()
        lines = [f"{self.model} with {self.title}", "", *aligned([header, *rows], left=FIRST_NUMBER, rule=True), ""]
        lines += [f"{heading:<19}{text}" for heading, text in self.summary()]
        if self.skipped:
            lines += ["", f"skipped: {len(self.skipped)}"]
            lines += [f"  {blocks}: {reason}" for blocks, reason in folded(self.skipped)]
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        lines = str(self).splitlines()
        start, end = (lines[2].index(f"{name} ") for name in ("SE after", "before"))
        for number, line in enumerate(lines):
            text = Text(line, "bold" if number in (0, 2) else "", no_wrap=True, overflow="ignore")
            if 4 <= number < 4 + len(self.rows):
                text.stylize("bold", 0, lines[2].index("class"))
                text.stylize("dark_orange", start, end)
            yield text


HEADER = ["block", "class", "kind", "SE after", "before", "feature map", "channels", "parameters", "multiply-adds"]
FIRST_NUMBER = 6


def percent(part: int, whole: int) -> str:
    """A share, in percent."""
    return f"{100 * part / whole:.2f}%" if whole else "0%"


def _space(shape: tuple[int, ...], channel_dim: int) -> tuple[int, ...]:
    """A shape without its channels; ``channel_dim`` is counted from the end."""
    return tuple(size for dim, size in enumerate(shape) if dim != len(shape) + channel_dim)


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} (+{after - before:,}, +{percent(after - before, before)})"


def report_of(found: Recorded) -> Report:
    """The report on an inspected model."""
    model, plan, cost = found.model, found.plan, costs(found)
    by_path = {site.path: pair for pair in found.blocks for site in pair.sites}
    rows = []
    for site in plan.sites:
        pair, own = by_path[site.path], cost.sites.get(site.path, NOT_CALLED)
        space = _space(own.shape, site.channel_dim)
        row = Row(
            site.path, site.block, pair.cls, site.kind, pair.se_after(site), pair.se_before(site),
            own.shape, site.channels, site.parameters, space, own.excitation, own.squeeze_scale,
        )  # fmt: skip
        rows.append(row)
    paths = {row.path for row in rows}
    new = {id(p) for path, m in model.named_modules() if path in paths and is_retrofitted(m) for p in m.parameters()}
    parameters = list(model.parameters())
    old = [p for p in parameters if id(p) not in new]
    return Report(
        class_name(model),
        tuple(rows),
        plan.skipped,
        plan.options,
        parameters_before=_numbers_in(old),
        parameters_after=_numbers_in(parameters),
        trainable_before=_numbers_in(p for p in old if p.requires_grad),
        trainable_after=_numbers_in(p for p in parameters if p.requires_grad),
        inputs=cost.inputs,
        resized=cost.resized,
        multiply_adds_before=cost.before,
        multiply_adds_after=cost.after,
        squeeze_scale=cost.squeeze_scale,
        what=plan.what,
    )


def _numbers_in(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
