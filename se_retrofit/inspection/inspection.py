"""One object that shows everything a retrofit changed. The network is recorded once for all views."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import RetrofitError, check_module
from ..fusion.attention import check_unfused
from ..models import IMAGES
from ..paths import writable
from ..plan import Plan
from ..retrofit import plan_of, warn_of_lost_sites
from ..saving.atomic import write_text
from ..surgery.record.inputs import Inputs, described_inputs, given_inputs, in_dtype_of
from ..surgery.record.runs import record
from ..tables import Name, counted
from .blocks import Inspected
from .diff import diff_lines
from .drawing import drawn
from .graphs import blocks_of
from .printing import block_lines, network_lines
from .report import Report, report_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Inspection(Inspected):
    """The result of ``inspect_se``. ``print(inspection)`` prints the report, ``rich.print(inspection)`` in colour.

    The argument ``block`` of a view is the path of a block, such as ``"layer1.0"``, of a module in it (its SE, say), or
    of a module around it that holds no other block. For any other path, an error lists the existing blocks.

    Attributes:
        model: the model that was inspected.
        plan: the plan by which it was retrofitted.
        record: the record of one run of it.
        blocks: its blocks with SE that run on the inputs, each with its ``torch.fx.Graph`` before and after, in the order of
            the plan.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, inspect_se
        >>> inspection = inspect_se(add_se(timm.create_model("resnet18"), reduction=16))
        >>> inspection.report().parameters_before
        11689512
        >>> block = inspection.block("layer1.0")
        >>> len(block.after.graph.nodes) - len(block.before.graph.nodes)
        1
        >>> print(inspection.graph("layer1.0"))  # doctest: +ELLIPSIS
          layer1.0: BasicBlock, residual
        > SE 64 -> 4 -> 64 after bn2 (BatchNorm2d), before +=
        ...
        >>> print(inspection.diff("layer1.0"))  # doctest: +ELLIPSIS
        --- layer1.0, BasicBlock.forward
        +++ layer1.0, BasicBlock.forward with SE
        ...
        -        x = self.bn2(x)
        +        x = self.se_attention(self.bn2(x))
        ...
        >>> inspection.draw(f"{tempfile.mkdtemp()}/resnet18.svg").name
        'resnet18.svg'
        >>> inspection.write_html(f"{tempfile.mkdtemp()}/resnet18.html").name
        'resnet18.html'
    """

    _report = cached_property(report_of)

    def report(self) -> Report:
        """Return what was inserted where, and what it costs: a row for each site, and totals."""
        return self._report

    def graph(self, block: str | None = None) -> str:
        """Return the network at the level of its blocks, with their classes, inputs and outputs; or the torch.fx graph
        of one block. Lines about SE have a ``>`` in the margin.

        Raises:
            RetrofitError: If there is no such block.
        """
        return Name("\n".join(network_lines(self) if block is None else block_lines(self.block(block))))

    def diff(self, block: str | None = None) -> str:
        """Return a unified diff of a block's source, from the author's code to the current; by default of all blocks.

        If SE is in an ``nn.Sequential``, the diff shows its elements; in a GraphModule, the generated code.

        Raises:
            RetrofitError: If there is no such block.
        """
        texts = []
        for pair, *others in self.distinct() if block is None else [[self.block(block)]]:
            alike = [f"like it: {', '.join(other.path for other in others)}"] if others else []
            texts.append("\n".join([*diff_lines(pair), *alike]))
        return Name("\n\n".join(texts))

    def draw(self, path: str | Path, block: str | None = None) -> Path:
        """Draw each distinct block before and after, with shapes on the edges and SE in orange.

        Blocks that only differ in names and numbers of channels are drawn once, with the shapes of the first one.

        Without ``block``, the whole network is drawn above them, with a column for each size of feature maps.

        Args:
            path: the file to write, which ends in ``.svg``. Browsers show it; ``rsvg-convert``, Inkscape or CairoSVG
                convert it to ``.png`` or ``.pdf``.
            block: the block to draw, instead of all.

        Raises:
            RetrofitError: If the path has another suffix, its folder does not exist, or there is no such block. Nothing
                is written then.
        """
        path = writable(path, ".svg")
        write_text(path, drawn(self, None if block is None else self.block(block)))
        return path

    def write_html(self, path: str | Path) -> Path:
        """Write an HTML page with totals, the network, the table of sites, and each distinct block before and after.

        It works offline and downloads nothing.

        Args:
            path: the file to write, which ends in ``.html`` or ``.htm``.

        Raises:
            RetrofitError: If the path has another suffix, or its folder does not exist. Nothing is written then.
        """
        from .page import page

        path = writable(path, ".html", ".htm")
        write_text(path, page(self, self._report))
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data that JSON can hold."""
        return json.loads(json.dumps(asdict(self._report)))

    def __str__(self) -> str:
        return str(self._report)

    def _repr_html_(self) -> str:
        return self._report._repr_html_()

    def __repr__(self) -> str:
        modules, blocks = counted(len(self.plan.sites), "SE module"), counted(len(self.blocks), "block")
        return f"<Inspection of {self._report.model}: {modules} in {blocks}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._report


def inspect_se(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Inspect a retrofitted model: where SE is, what it costs, and each block before and after.

    Args:
        model: a model from ``add_se``; it is not changed.
        example_inputs: a tensor or a tuple of positional inputs, whose shapes and dtypes determine the shapes and
            multiply-adds that are shown. By default, images of the size that the model was fine-tuned at, or inputs of
            the shapes that it was retrofitted with.

    Returns:
        An object with all views: ``report()``, ``graph()``, ``diff()``, ``draw()``, ``write_html()``; ``block()`` and
        ``to_dict()`` for further processing.

    Raises:
        RetrofitError: If the model has no SE from ``add_se``, was fused by ``fuse_se``, or can't be run on the inputs.
        TypeError: If ``model`` is not an nn.Module, or the inputs are not in a form that ``add_se`` accepts.

    Warns:
        UserWarning: If modules that held SE were replaced after the retrofit, so that their SE is gone.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, inspect_se
        >>> inspect_se(add_se(timm.create_model("resnet18"), reduction=16))
        <Inspection of ResNet: 8 SE modules in 8 blocks>
    """
    check_module(model)
    try:
        plan = plan_of(model)
    except RetrofitError as error:
        raise RetrofitError(
            f"{error}: call add_se(model) first, or print(plan_se(model)) to see what it would do"
        ) from None
    check_unfused(model, "inspect_se")
    found = record(model, _inputs(model, plan, example_inputs))
    warn_of_lost_sites(model)
    return Inspection(model, plan, found, blocks_of(model, plan, found))


def _inputs(model: nn.Module, plan: Plan, example_inputs: Any) -> Inputs | None:
    """Return the given inputs, or inputs of the size that the model was fine-tuned at, or of the shapes of its plan."""
    if example_inputs is not None:
        return given_inputs(example_inputs)
    if (images := vars(model).get(IMAGES)) is not None:
        return in_dtype_of(model, Inputs((torch.empty(2, *images["input_size"], device="meta"),)), None)
    try:
        return described_inputs(plan.inputs, model)
    except ValueError as error:
        raise RetrofitError(f"{error}; or give example_inputs") from None
