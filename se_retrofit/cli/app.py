"""What all commands share: the application they register with, and one line instead of a traceback for mistakes."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..errors import RetrofitError

app = typer.Typer(
    name="se-retrofit",
    help="Retrofit Squeeze-and-Excitation into existing convolutional networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        typer.echo(f"se-retrofit {__version__}")
        raise typer.Exit


def say(console: Console, text: Any = "") -> None:
    """Print text as it stands: no markup, no colours by guess, no line breaks at the width of a pipe."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def run(application: typer.Typer = app) -> None:
    """Run the command that the arguments name."""
    try:
        application()
    except RetrofitError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
