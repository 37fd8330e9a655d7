"""The command line: ``se-retrofit COMMAND``. Each command is a file of its own in this folder."""

from . import convert, demo  # each registers its command
from .app import main

__all__ = ["convert", "demo", "main"]
