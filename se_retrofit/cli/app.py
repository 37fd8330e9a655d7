"""Collects the commands, and turns the user's mistakes into one line instead of a traceback."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from ..errors import RetrofitError

app = typer.Typer(
    name="se-retrofit",
    help="Retrofit Squeeze-and-Excitation into existing convolutional networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of ``se-retrofit`` and ``python -m se_retrofit``."""
    from . import convert, demo, zoo  # noqa: F401  (each registers its command)

    try:
        app()
    except RetrofitError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {error}", soft_wrap=True)
        sys.exit(1)
