"""Tables as text and in notebooks, as used by everything that this package prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Name(str):
    """A string whose repr has no quotes, for names in lists and tuples."""

    def __repr__(self) -> str:
        return str(self)


def aligned(rows: Iterable[Sequence[str]], *, left: int | None = None, rule: bool = False) -> list[str]:
    """Format rows of equal length as lines of text, with two spaces between the columns. The first ``left`` columns are
    left-aligned, the others (numbers) right-aligned; ``rule`` draws a line under the first row.

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


def short(text: str, letters: int) -> str:
    """Shorten a name that has more than ``letters`` letters in the middle: ``a_rather_...me_7.jpg``."""
    end = (letters - 3) // 2
    return text if len(text) <= letters else f"{text[: letters - 3 - end]}...{text[-end:]}"


def few(names: Iterable[str], most: int = 3) -> str:
    """List the first names and the number of others: ``layer1.0, layer1.1 and 2 more``."""
    names = list(names)
    if len(names) <= most + 1:  # "and 1 more" would be no shorter than the name
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more"


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 SE module``, ``2 SE modules``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def as_html(
    rows: Iterable[Sequence[str]], *, left: int | None = None, above: str = "", below: Iterable[str] = ()
) -> str:
    """Format the same rows as an HTML table with the first row as its head, a line above it and others below."""

    def line(row: Sequence[str], tag: str) -> str:
        sides = ("left" if left is None or i < left else "right" for i in range(len(row)))
        cells = (f'<{tag} style="text-align: {s}">{escape(c)}</{tag}>' for s, c in zip(sides, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    table = f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in body)}</tbody></table>"
    first = f"<b>{escape(above)}</b>" if above else ""
    return f"<div>{first}{table}{'<br>'.join(map(escape, below))}</div>"
