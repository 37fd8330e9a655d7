"""Tables as text: how every printout of this package puts cells into columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["aligned"]


def aligned(rows: Iterable[Sequence[str]], *, left: int | None = None, rule: bool = False) -> list[str]:
    """Rows of cells as lines of text, with two spaces between the columns.

    Args:
        rows: as many cells in each.
        left: so many columns are aligned to the left, the others, of numbers, to the right; None for all.
        rule: draw a line under the first row.

    Example:
        >>> from se_retrofit.tables import aligned
        >>> print("\\n".join(aligned([("block", "channels"), ("layer1.0", "64")], left=1, rule=True)))
        block     channels
        --------  --------
        layer1.0        64
    """
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if rule:
        rows.insert(1, ["-" * width for width in widths])
    left = len(widths) if left is None else left

    def line(row: Sequence[str]) -> str:
        cells = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
