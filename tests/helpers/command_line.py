"""The command line, called as a program would call it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from se_retrofit.cli.commands import app


def called(*arguments: object) -> Result:
    """What a command did; what it raised is in the result."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def said(*arguments: object) -> str:
    """What a command printed that did what it should; what it raises is raised."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
