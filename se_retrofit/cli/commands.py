"""All commands: importing this file registers them with the application."""

from . import compare, convert, demo, export, finetune, fold, inspect
from .app import app, run

__all__ = ["app", "compare", "convert", "demo", "export", "finetune", "fold", "inspect", "run"]
