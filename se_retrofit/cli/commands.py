"""All commands: importing this file registers them with the application."""

from . import compare, convert, demo, export, finetune, fold, inspect, push, timm_scripts
from .app import app, run

__all__ = ["app", "compare", "convert", "demo", "export", "finetune", "fold", "inspect", "push", "run", "timm_scripts"]
