"""What a retrofit inserted where, and what it costs: as a table for people, and as plain data for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..plan import Site, Skipped, folded
from ..surgery.splice.undo import is_retrofitted
from ..tables import aligned, as_html
from .blocks import BlockPair, Inspected, class_name
from .costs import NOT_CALLED, SiteCost, human, multiply_adds, one_input, resized, site_costs

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


NUMBERS = ("channels", "parameters", "multiply-adds")
OPTIONAL = ("kind", "channels", "class", "before", "multiply-adds", "feature map")  # least important first


@dataclass(frozen=True)
class Row:
    """The row of a site.

    Attributes:
        path: path of the SE module.
        block, cls, kind: path of the block, its class before the retrofit, and its kind ("residual", "dense", ...).
        after, before: what computes the value that SE scales, and what uses the result, within the block.
        shape: shape of that value, without the batch; () if the module is not called on these inputs.
        channels, parameters: numbers of channels and parameters of the SE module.
        excitation, squeeze_scale: its multiply-adds (see ``costs``); None if it is not called on these inputs.
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
    excitation: int | None
    squeeze_scale: int | None

    @property
    def multiply_adds(self) -> int | None:
        """Total multiply-adds of the SE module."""
        return None if self.excitation is None or self.squeeze_scale is None else self.excitation + self.squeeze_scale

    def cells(self) -> dict[str, str]:
        """Return the row as text, by the heading of each column."""
        return {
            "block": self.block or "(model)",
            "class": self.cls,
            "kind": self.kind,
            "SE after": self.after,
            "before": self.before,
            "feature map": "x".join(map(str, self.shape)),
            "channels": f"{self.channels:,}",
            "parameters": f"{self.parameters:,}",
            "multiply-adds": "" if self.multiply_adds is None else f"{self.multiply_adds:,}",
        }


@dataclass(frozen=True)
class Report:
    """What a retrofit inserted where, and its cost. ``str(report)`` is plain text, ``rich.print(report)`` is coloured.

    Attributes:
        model: name of the model's class before the retrofit.
        rows: one row per site.
        skipped: the blocks that were skipped, with reasons.
        options: the options of the retrofit.
        parameters_before, parameters_after: number of parameters of the whole network.
        trainable_before, trainable_after: number of parameters that now require a gradient, without SE and with it.
        inputs: shape of one input of the network, for which multiply-adds are counted.
        resized: the shape to which the network itself resizes its input, as detectors do; None if it doesn't.
        multiply_adds_before, multiply_adds_after: of convolutions, linear layers and matrix products; None if unknown.
        squeeze_scale: multiply-adds of SE's squeezes and scales, one per value, which these leave out.
        what: the inserted attention in few words: ``"SE"``.
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
    def heading(self) -> str:
        """The network, and the full name of what is inserted."""
        return f"{self.model} with {'Squeeze-and-Excitation' if self.what == 'SE' else f'{self.what} modules'}"

    def table(self, width: float = math.inf) -> list[str]:
        """Return the table as lines; the least important columns are dropped until it is no wider than ``width``."""
        cells = [row.cells() for row in self.rows]
        for gone in range(len(OPTIONAL) + 1):
            columns = [name for name in cells[0] if name not in OPTIONAL[:gone]]
            texts = [columns, *([row[name] for name in columns] for row in cells)]
            lines = aligned(texts, left=sum(name not in NUMBERS for name in columns), rule=True)
            if len(lines[1]) <= width:
                break
        return lines

    def totals(self) -> list[str]:
        """Return the lines below the table."""
        of = "" if self.what != "SE" else f", reduction {self.options['reduction']}, gate {self.options['gate']}"
        before, after = self.parameters_before, self.parameters_after
        share = percent(self.trainable_after, after)
        totals = {
            f"{self.what} modules": f"{len(self.rows)}{of}",
            "parameters": f"{before:,} -> {after:,} (+{after - before:,}, +{percent(after - before, before)})",
            "trainable": f"{self.trainable_before:,} -> {self.trainable_after:,} ({share} of all)",
            **self._multiply_adds(),
        }
        lines = [f"{heading:<19}{text}" for heading, text in totals.items()]
        if self.skipped:
            lines += ["", f"skipped: {len(self.skipped)}"]
            lines += [f"  {blocks}: {reason}" for blocks, reason in folded(self.skipped)]
        return lines

    def _multiply_adds(self) -> dict[str, str]:
        before, layers = self.multiply_adds_before, self.multiply_adds_after
        if before is None or layers is None:
            return {"multiply-adds": "unknown: the network can't be run to its end without data"}
        after = layers + self.squeeze_scale
        resized = f", resized to {self.resized} by the network" if self.resized else ""
        whole, alone = (f"{human(before)} -> {human(n)} (+{percent(n - before, before)})" for n in (after, layers))
        return {"multiply-adds": f"{whole} for one {self.inputs} input{resized}", "  of layers alone": alone}

    def __str__(self) -> str:
        return "\n".join([self.heading, "", *self.table(), "", *self.totals()])

    def _repr_html_(self) -> str:
        cells = [row.cells() for row in self.rows]
        left = sum(name not in NUMBERS for name in cells[0])
        rows = [list(cells[0]), *(list(row.values()) for row in cells)]
        return as_html(rows, left=left, above=self.heading, below=self.totals())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield Text(f"{self.heading}\n", "bold")
        header, rule, *rows = self.table(options.max_width)
        yield Text(header, "bold", no_wrap=True, overflow="ignore")
        yield Text(rule, no_wrap=True, overflow="ignore")
        start, after = header.index("SE after"), max(len(row.after) for row in self.rows)
        for line, row in zip(rows, self.rows, strict=True):
            text = Text(line, no_wrap=True, overflow="ignore")
            text.stylize("bold", 0, len(row.block))
            text.stylize("dark_orange", start, start + after)
            yield text
        yield Text("\n" + "\n".join(self.totals()))


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "0%"


def report_of(found: Inspected) -> Report:
    model, plan, sites = found.model, found.plan, site_costs(found.record)
    modules = dict(model.named_modules())
    pairs = {site.path: pair for pair in found.blocks for site in pair.sites}
    rows = [_row(site, pairs.get(site.path), sites.get(site.path, NOT_CALLED), modules) for site in plan.sites]
    new = {id(p) for row in rows if is_retrofitted(se := modules.get(row.path)) for p in se.parameters()}
    parameters = list(model.parameters())
    old = [p for p in parameters if id(p) not in new]
    excitations = [site.excitation for site in sites.values()]
    after = multiply_adds(model, found.record)
    return Report(
        class_name(model),
        tuple(rows),
        plan.skipped,
        plan.options,
        parameters_before=_numbers_in(old),
        parameters_after=_numbers_in(parameters),
        trainable_before=_numbers_in(p for p in old if p.requires_grad),
        trainable_after=_numbers_in(p for p in parameters if p.requires_grad),
        inputs=one_input(found.record)[0],
        resized=resized(found.record),
        multiply_adds_before=None if after is None or None in excitations else after - sum(e or 0 for e in excitations),
        multiply_adds_after=after,
        squeeze_scale=sum(site.squeeze_scale or 0 for site in sites.values()),
        what=plan.what,
    )


def _row(site: Site, pair: BlockPair | None, cost: SiteCost, modules: Mapping[str, nn.Module]) -> Row:
    """Return the row of a site; ``pair`` is None if its block does not run on these inputs."""
    after, before = (site.after, "") if pair is None else (pair.se_after(site), pair.se_before(site))
    cls = class_name(modules.get(site.block, modules[""])) if pair is None else pair.cls
    return Row(
        site.path, site.block, cls, site.kind, after, before,
        cost.shape, site.channels, site.parameters, cost.excitation, cost.squeeze_scale,
    )  # fmt: skip


def _numbers_in(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
