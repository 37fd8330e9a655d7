"""All commands: importing this file registers them with the application."""

from . import add, compare, demo, evaluate, export, find_lr, finetune, fold, inspect, predict, push, timm_scripts  # noqa: F401
from .app import app as app
from .app import run as run
