"""What all commands share: the application that they register with, and errors in one line instead of a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..errors import RetrofitError


class WrongUsage(RetrofitError):
    """Options that are wrong whatever the network and the data."""


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
    """Print text as it is: no markup, no automatic colours, no line wrapping in a pipe."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def leave_to_json(context: typer.Context, file: Path | None) -> None:
    """Print all else that a command says on the standard error if JSON goes to the standard output."""
    if str(file) == "-":
        context.obj = sys.stdout
        context.with_resource(contextlib.redirect_stdout(sys.stderr))


def write_json(context: typer.Context, data: Any, file: Path) -> None:
    """Write plain data as JSON; ``-`` stands for the standard output, which ``leave_to_json`` has kept free."""
    from ..saving.atomic import write_text

    text = json.dumps(data, indent=2) + "\n"
    if str(file) == "-":
        context.obj.write(text)
        return
    write_text(file, text)
    say(Console(), f"wrote {file}")


def run(application: typer.Typer = app) -> None:
    """Run the command named by the arguments; Ctrl-C ends it with exit code 130, as a shell expects."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # names of files and classes may have characters that the output's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        application()
    except SystemExit as ended:
        if isinstance(ended.__context__, typer.Abort):
            sys.exit(130)
        raise
    except Exception as error:
        # OSError of a disk that is full behind the standard output, say
        if not isinstance(error, (RetrofitError, OSError, *_out_of_memory())):
            raise
        said = ". ".join([str(error), *getattr(error, "__notes__", ())])
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(said)}", soft_wrap=True)
        sys.exit(2 if isinstance(error, WrongUsage) else 1)


def _out_of_memory() -> tuple[type[Exception], ...]:
    """Return torch's error for a GPU without memory left; nothing if torch was not needed so far."""
    return (sys.modules["torch"].OutOfMemoryError,) if "torch" in sys.modules else ()
