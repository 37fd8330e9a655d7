"""The command line: ``se-retrofit COMMAND``. Each command is a file of its own in this folder."""

from . import compare, convert, demo, finetune, inspect, zoo  # each registers its command
from .app import main

__all__ = ["compare", "convert", "demo", "finetune", "inspect", "main", "zoo"]
