"""The rows of a walk as a CSV file, which a later walk goes on with, and as Markdown tables."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from se_retrofit.errors import RetrofitError

from .check import CONVERTED, FAILED, HAS_ATTENTION, KINDS, NO_BLOCKS, Row
from .last_run import FullRun, read_run

COLUMNS = (
    "name",
    "family",
    "verdict",
    *KINDS,
    "se_modules",
    "parameters",
    "extra_parameters",
    "classes",
    "skipped",
    "seconds",
)

BEGIN, END = "<!-- python -m tools.zoo: begin -->", "<!-- python -m tools.zoo: end -->"


# CSV --------------------------------------------------------------------------------------------------------------------


class RowWriter:
    """Appends rows to a CSV file, each at once, so that a walk that is cut off loses nothing."""

    def __init__(self, path: Path) -> None:
        new = not path.exists() or path.stat().st_size == 0
        if not new:
            _drop_torn_line(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if new:
            self._writer.writeheader()

    def write(self, row: Row) -> None:
        self._writer.writerow(_cells(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Take off half a line at the end, which a walk that was killed may have left."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def _cells(row: Row) -> dict[str, object]:
    return {
        "name": row.name, "family": row.family, "verdict": row.verdict,
        **{kind: row.kinds.get(kind, 0) for kind in KINDS},
        "se_modules": row.sites, "parameters": row.parameters, "extra_parameters": row.extra,
        "classes": " ".join(row.classes), "skipped": json.dumps(row.skipped) if row.skipped else "",
        "seconds": f"{row.seconds:.2f}",
    }  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file that a walk wrote; none if there is no such file.

    Raises:
        RetrofitError: the file is something else.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a walk that was killed may have left half a line at the end
    reader = csv.DictReader(io.StringIO(whole))
    if tuple(reader.fieldnames or ()) not in ((), COLUMNS):
        raise RetrofitError(f"{path} was not written by python -m tools.zoo (of this version): its columns are others")
    try:
        return [_row(cells) for cells in reader]
    except (TypeError, ValueError, KeyError) as error:
        raise RetrofitError(f"{path} is damaged ({error}); delete it, or give --fresh") from error


def _row(cells: dict[str, str]) -> Row:
    return Row(
        cells["name"], cells["family"], cells["verdict"], int(cells["parameters"]), int(cells["extra_parameters"]),
        {kind: int(cells[kind]) for kind in KINDS if int(cells[kind])}, cells["classes"].split(),
        json.loads(cells["skipped"]) if cells["skipped"] else {}, float(cells["seconds"]),
    )  # fmt: skip


def structure(row: Row) -> Hashable:
    """What tells networks apart: library, family, verdict, the classes of the blocks with SE, and their kinds."""
    return row.name.partition("/")[0], row.family, row.verdict, *row.classes, *row.kinds


def smallest(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """The row with the fewest parameters for each value of a key, sorted by name.

    Example:
        >>> from tools.zoo import Row
        >>> rows = [Row("timm/b", "f", "converted", 20), Row("timm/a", "f", "converted", 10)]
        >>> [row.name for row in smallest(rows, structure)]
        ['timm/a']
    """
    found: dict[Hashable, Row] = {}
    for row in sorted(rows, key=lambda row: (row.parameters, row.name)):
        found.setdefault(key(row), row)
    return sorted(found.values(), key=lambda row: row.name)


# Markdown ---------------------------------------------------------------------------------------------------------------


def verdict_kind(row: Row) -> str:
    """The verdict without a failure's reason."""
    return "failed" if row.verdict.startswith(FAILED) else row.verdict


def summary_line(rows: Iterable[Row]) -> str:
    """How many names had which verdict, in one line."""
    counts = Counter(map(verdict_kind, rows))
    parts = [f"{counts[v]} {v}" for v in (CONVERTED, NO_BLOCKS, HAS_ATTENTION, "failed")]
    return f"{sum(counts.values())} names: {', '.join(parts)}"


def family_table(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line a family, after a header: how many names, with which verdict, and which kinds of blocks."""
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[f"{row.name.partition('/')[0]} {row.family}"].append(row)
    table: list[tuple[str, ...]] = [
        ("family", "names", "converted", "no conv blocks", "has attention", "failed", "SE modules", "kinds", "blocks")
    ]
    for family, members in sorted(families.items()):
        counts = Counter(map(verdict_kind, members))
        sites = sorted(row.sites for row in members if row.verdict == CONVERTED)
        spread = "" if not sites else f"{sites[0]}" if sites[0] == sites[-1] else f"{sites[0]} to {sites[-1]}"
        kinds = [kind for kind in KINDS if any(kind in row.kinds for row in members)]
        classes = sorted({cls for row in members for cls in row.classes})
        numbers = [str(counts[v] or "") for v in (CONVERTED, NO_BLOCKS, HAS_ATTENTION, "failed")]
        table.append((family, str(len(members)), *numbers, spread, ", ".join(kinds), ", ".join(classes)))
    return table


def write_markdown(rows: list[Row], path: Path, run: FullRun | None = None) -> None:
    """Write the tables into a Markdown file: between the two marks, if it has them, so that the text around them stays.

    Args:
        rows: of the tables.
        path: of the file.
        run: in which all rows were made; without it, the last full run is still the one that the file names.

    Raises:
        RetrofitError: the file exists and has no such marks.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    body = f"{BEGIN}\n{_markdown(rows, run or read_run(text))}{END}"
    if path.exists():
        if BEGIN not in text or END not in text:
            raise RetrofitError(
                f"{path} exists and has no lines {BEGIN} and {END} to write between; give another --output"
            )
        before, _, rest = text.partition(BEGIN)
        body = before + body + rest.partition(END)[2]
    path.write_text(body.rstrip("\n") + "\n", encoding="utf-8")


def _markdown(rows: list[Row], run: FullRun | None) -> str:
    rows = sorted(rows, key=lambda row: row.name)
    seconds = sum(row.seconds for row in rows)
    sections = [
        f"{summary_line(rows)}. The rows took {seconds / 60:.0f} minutes of one core.\n",
        f"{run or 'Never run in full.'}\n",
        "### By family\n",
        _lines(family_table(rows)),
    ]
    failed = [row for row in rows if row.verdict.startswith(FAILED)]
    if failed:
        sections += [
            "### Failed\n",
            _lines([("name", "why"), *((r.name, r.verdict.removeprefix(FAILED)) for r in failed)]),
        ]
    sections += [
        "### Blocks left out of networks that were converted\n",
        _lines(_skipped_table(rows)),
        "### Every name\n",
        _lines([("name", "verdict", "SE modules", "extra parameters", "of", "seconds"), *map(_line, rows)]),
    ]
    return "\n".join(sections)


def _skipped_table(rows: list[Row]) -> list[tuple[str, ...]]:
    where: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for reason in row.skipped:
            where[reason].append(row)
    table: list[tuple[str, ...]] = [("reason", "blocks", "networks", "for instance")]
    for reason, members in sorted(where.items(), key=lambda item: -len(item[1])):
        blocks = sum(row.skipped[reason] for row in members)
        some = ", ".join(row.name for row in members[:3])
        table.append((reason, str(blocks), str(len(members)), some))
    return table


def _line(row: Row) -> tuple[str, ...]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.kinds.items())
    extra = f"{row.extra:,} (+{row.extra / row.parameters:.1%})" if row.sites and row.parameters else ""
    return row.name, row.verdict, kinds, extra, f"{row.parameters:,}", f"{row.seconds:.1f}"


def _lines(table: list[tuple[str, ...]]) -> str:
    head, *body = [[cell.replace("|", r"\|") for cell in line] for line in table]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
