"""``python -m tools.zoo``: retrofit every network of torchvision and timm, and tabulate how it went."""

from __future__ import annotations

import os
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from se_retrofit.errors import RetrofitError
from se_retrofit.tables import aligned

from .check import FAILED, Row
from .last_run import present_run
from .names import Entry, entries
from .tables import RowWriter, family_table, read_rows, summary_line, write_markdown
from .walk import walk

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

HELP = """
Retrofit networks of timm and torchvision by name, with random weights, check each, and tabulate how it went.

A walk that was cut off goes on where it stopped when called again with the same output. NAME.md names the commit and
the versions of the last walk over all names that was made in one go.

Examples:

- `python -m tools.zoo 'resnet*'`
- `python -m tools.zoo 'torchvision/*' --jobs 4`
- `python -m tools.zoo --output zoo --jobs 8` (all names: zoo.csv and zoo.md)

Exit codes: 0, each network was converted or refused for a reason; 1, some failed; 2, wrong usage.
"""


@app.command(help=HELP)
def zoo(
    patterns: list[str] = typer.Argument(
        None, help="Models, as shell patterns: 'resnet*', 'torchvision/*'. Default: all."
    ),
    jobs: int = typer.Option(0, "--jobs", "-j", min=0, help="Processes at a time; 0, as many as there are cores."),
    output: Path | None = typer.Option(None, help="Write NAME.csv, row by row, and at the end NAME.md."),
    timeout: float = typer.Option(300.0, min=1.0, help="Seconds that one network may take."),
    fresh: bool = typer.Option(
        False, "--fresh", help="Begin anew instead of going on with the CSV file that is there."
    ),
) -> None:
    chosen = entries(patterns or ())
    rows = _rows_so_far(chosen, output, fresh)
    done = {row.name for row in rows}
    todo = [entry for entry in chosen if entry.name not in done]
    full = not patterns and not done
    console = Console(stderr=True)
    rows += _walk(todo, jobs or os.cpu_count() or 1, timeout, output, console)
    if output is not None:
        write_markdown(rows, output.with_name(f"{output.name}.md"), present_run() if full else None)
    _print(rows, Console())
    if any(row.verdict.startswith(FAILED) for row in rows):
        raise typer.Exit(1)


def _rows_so_far(chosen: list[Entry], output: Path | None, fresh: bool) -> list[Row]:
    if output is None:
        return []
    if not output.parent.is_dir():
        raise RetrofitError(f"there is no folder {output.parent} to write {output.name}.csv into")
    path = output.with_name(f"{output.name}.csv")
    if fresh:
        path.unlink(missing_ok=True)
    names = {entry.name for entry in chosen}
    return [row for row in read_rows(path) if row.name in names]


def _walk(todo: list[Entry], jobs: int, timeout: float, output: Path | None, console: Console) -> list[Row]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    rows = []
    writer = RowWriter(output.with_name(f"{output.name}.csv")) if output is not None else None
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("zoo", total=len(todo))
            for row in walk(todo, jobs, timeout):
                rows.append(row)
                if writer is not None:
                    writer.write(row)
                if row.verdict.startswith(FAILED):
                    progress.console.print(f"{row.name}: {row.verdict}", markup=False, highlight=False, soft_wrap=True)
                progress.update(task, advance=1, description=row.name)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _print(rows: list[Row], console: Console) -> None:
    """One line a network if they are few, one line a family if they are many; then the sums."""
    if len(rows) <= 40:
        table: list[tuple[str, ...]] = [("name", "verdict", "SE modules", "extra parameters")]
        for row in sorted(rows, key=lambda row: row.name):
            kinds = ", ".join(f"{count} {kind}" for kind, count in row.kinds.items())
            table.append((row.name, row.verdict, kinds, f"{row.extra:,}" if row.sites else ""))
    else:
        table = [line[:-1] for line in family_table(rows)]
    for line in aligned(table):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(summary_line(rows), markup=False, highlight=False, soft_wrap=True)
