"""What each module of a retrofitted network holds, returns and costs: the table below the table of sites."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..surgery.record.graph import Record
from ..surgery.splice.undo import is_retrofitted
from ..tables import aligned
from .blocks import describe
from .costs import human
from .lines import Line
from .measuring import Number

__all__ = ["FIRST_NUMBER", "HEADER", "ModuleRow", "cells_of", "module_lines", "module_rows", "size"]


@dataclass(frozen=True)
class ModuleRow:
    """One module, with all that is in it.

    Attributes:
        path: of the module; "" for the network itself.
        words: its class (before the retrofit), and the sizes of a layer: ``Conv2d 64 -> 256, 1x1``.
        se: whether it is an SE module.
        shapes: of what its first call returns, without the batch; () where it is not called on these inputs, or a part
            of a module that counts as one operation (of SE, of torch.nn's).
        parameters: each counted once, however often it is used.
        multiply_adds: for one input, over all calls; None where the network can't be run to its end without data.
        milliseconds: for one input, over all calls in eval mode; None where it was not measured.
        saved_bytes: what autograd saves in it for the backward pass, for one input; None where it was not measured, or where
            the network can't be run in train mode on these inputs. A tensor that several modules save is the first one's.
    """

    path: str
    words: str
    se: bool
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    multiply_adds: int | None
    milliseconds: float | None
    saved_bytes: int | None

    @property
    def depth(self) -> int:
        """How many modules it is in."""
        return self.path.count(".") + 1 if self.path else 0


def module_rows(
    model: nn.Module,
    record: Record,
    multiply_adds: dict[str, int] | None,
    milliseconds: dict[str, float] | None = None,
    saved_bytes: dict[str, int] | None = None,
) -> tuple[ModuleRow, ...]:
    """A row for each module of a model, in the order in which they are registered. The numbers are by path."""
    shapes = _shapes(record)
    return tuple(
        ModuleRow(
            path,
            describe(module),
            is_retrofitted(module),
            tuple(shapes.get(path, ())),
            sum(p.numel() for p in module.parameters()),
            _with_parts(module, path, multiply_adds),
            _with_parts(module, path, milliseconds),
            _with_parts(module, path, saved_bytes),
        )
        for path, module in model.named_modules()
    )


def _shapes(record: Record) -> dict[str, list[tuple[int, ...]]]:
    """What the first call of each module returns."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for call in record.calls:
        shapes.setdefault(call.path, [tuple(op.shape[1:]) for op in call.outputs])
        for op, _, path in call.passes:
            shapes.setdefault(path, [tuple(op.shape[1:])])
    for op in record.ops:
        if op.module is not None and op.path is not None:
            shapes.setdefault(op.path, [tuple(op.shape[1:])])
    return shapes


def _with_parts(module: nn.Module, path: str, numbers: dict[str, Number] | None) -> Number | None:
    """A module's number; of a list of modules, which is not called itself, the sum of theirs."""
    if numbers is None:
        return None
    if path in numbers:
        return numbers[path]
    parts = ((m, f"{path}.{name}" if path else name) for name, m in module.named_children())
    return sum((_with_parts(m, p, numbers) or 0 for m, p in parts), start=type(next(iter(numbers.values()), 0))(0))


# As a table -----------------------------------------------------------------------------------------------------------

HEADER = ["module", "class", "output", "parameters", "multiply-adds", "milliseconds", "saved"]
FIRST_NUMBER = 3


def cells_of(row: ModuleRow) -> list[str]:
    """What stands in a module's row, below ``HEADER``; the module's name is indented by its depth."""
    return [
        "  " * row.depth + (row.path.rpartition(".")[2] or "(model)"),
        row.words,
        _shapes_in_words(row.shapes),
        f"{row.parameters:,}",
        "" if row.multiply_adds is None else human(row.multiply_adds),
        "" if row.milliseconds is None else f"{row.milliseconds:.3f}",
        "" if row.saved_bytes is None else size(row.saved_bytes),
    ]


def module_lines(rows: Iterable[ModuleRow], depth: int | None = None) -> list[Line]:
    """The table of modules as text, of those down to a depth; columns without any number are left out."""
    chosen = [row for row in rows if depth is None or row.depth <= depth]
    cells = [cells_of(row) for row in chosen]
    kept = [i for i in range(len(HEADER)) if any(row[i] for row in cells)]
    table = [[row[i] for i in kept] for row in [HEADER, *cells]]
    header, rule, *texts = aligned(table, left=FIRST_NUMBER, rule=True)
    lines = [Line(header, style="bold"), Line(rule)]
    return lines + [Line(text, row.se) for text, row in zip(texts, chosen, strict=True)]


def _shapes_in_words(shapes: tuple[tuple[int, ...], ...]) -> str:
    few = ["x".join(map(str, shape)) or "scalar" for shape in shapes[:2]]
    return ", ".join([*few, "..."] if len(shapes) > 2 else few)


def size(number: int) -> str:
    """A number of bytes in four digits: ``96.34 MB``."""
    return f"{human(number)}B" if number >= 1000 else f"{number} B"
