"""The command line: ``se-retrofit COMMAND``. Each command is a file of its own in this folder."""

from . import compare, convert, demo, export, finetune, fold, inspect, zoo  # each registers its command
from .app import main

__all__ = ["compare", "convert", "demo", "export", "finetune", "fold", "inspect", "main", "zoo"]
