"""The command line: ``se-retrofit COMMAND``. Each command is a file of its own in this folder."""

from .app import main

__all__ = ["main"]
