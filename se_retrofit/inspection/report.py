"""What a retrofit put where, and what it costs: a table for people, plain data for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..plan import Skipped, folded
from ..surgery.splice.undo import is_retrofitted
from ..tables import aligned
from .blocks import class_name
from .costs import costs, human
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
    """What a retrofit put where, and what it costs. ``str(report)`` is plain text, ``rich.print(report)`` a table in colour.

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
        data = asdict(self)
        data["rows"] = [{**row, "shape": list(row["shape"]), "space": list(row["space"])} for row in data["rows"]]
        data["skipped"] = list(data["skipped"])
        return data

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

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
        header = [
            "block",
            "class",
            "kind",
            "SE after",
            "before",
            "feature map",
            "channels",
            "parameters",
            "multiply-adds",
        ]
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
        return header, rows

    def __str__(self) -> str:
        header, rows = self.cells()
        lines = [
            f"{self.model} with {self.title}",
            "",
            *aligned([header, *rows], left=FIRST_NUMBER, rule=True),
            "",
        ]
        lines += [f"{heading:<19}{text}" for heading, text in self.summary()]
        if self.skipped:
            lines += [
                "",
                f"skipped: {len(self.skipped)}",
                *(f"  {blocks}: {reason}" for blocks, reason in folded(self.skipped)),
            ]
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        header, rows = self.cells()
        table = Table(
            title=f"{self.model} with {self.title}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
        )
        for i, name in enumerate(header):
            table.add_column(
                name,
                justify="right" if i >= FIRST_NUMBER else "left",
                style=_STYLES.get(name),
                overflow="fold",
                no_wrap=name == "block",
            )
        previous = None
        for row, data in zip(rows, self.rows, strict=True):
            if previous is not None and data.space != previous:
                table.add_section()
            previous = data.space
            table.add_row(*(Text(cell) for cell in row))
        yield table
        for heading, text in self.summary():
            yield Text.assemble((f"{heading:<19}", "bold"), text)
        if self.skipped:
            yield Text(f"\nskipped: {len(self.skipped)}", style="bold")
            for blocks, reason in folded(self.skipped):
                yield Text.assemble(f"  {blocks}: ", (reason, "dim"))


FIRST_NUMBER = 6
_STYLES = {"SE after": "dark_orange", "block": "bold"}


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
        pair, price = by_path[site.path], cost.sites.get(site.path)
        rows.append(
            Row(
                site.path,
                site.block,
                pair.cls,
                site.kind,
                pair.se_after(site),
                pair.se_before(site),
                price.shape if price else (),
                site.channels,
                site.parameters,
                _space(price.shape, site.channel_dim) if price else (),
                price.excitation if price else None,
                price.squeeze_scale if price else None,
            )
        )
    inserted = {site.path for site in plan.sites}
    new = {id(p) for path, m in model.named_modules() if path in inserted and is_retrofitted(m) for p in m.parameters()}
    parameters = list(model.parameters())
    return Report(
        class_name(model),
        tuple(rows),
        plan.skipped,
        plan.options,
        parameters_before=sum(p.numel() for p in parameters if id(p) not in new),
        parameters_after=sum(p.numel() for p in parameters),
        trainable_before=sum(p.numel() for p in parameters if p.requires_grad and id(p) not in new),
        trainable_after=sum(p.numel() for p in parameters if p.requires_grad),
        inputs=cost.inputs,
        resized=cost.resized,
        multiply_adds_before=cost.before,
        multiply_adds_after=cost.after,
        squeeze_scale=cost.squeeze_scale,
        what=plan.what,
    )
