"""Ctrl-C and SIGTERM while a command trains."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import typer

__all__ = ["Signals"]

PATIENCE = 1.0  # seconds; torchrun passes the terminal's own Ctrl-C on once more


class Signals:
    """A context in which the first Ctrl-C or SIGTERM sets ``stop``, by which a fine-tune ends after a checkpoint, and the
    next Ctrl-C ends it at once. Either way the command exits with 128 and the signal's number."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.signal: int | None = None
        self.since = 0.0

    def __enter__(self) -> Signals:
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                # not by print, which must not be entered again from a signal handler
                os.write(
                    2, b"stopping after this update and a checkpoint; Ctrl-C stops at once, at the last checkpoint\n"
                )
            self.stop.set()
        elif number == signal.SIGINT and time.monotonic() - self.since > PATIENCE:
            raise KeyboardInterrupt

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from ..finetune import Stopped

        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if isinstance(error, (Stopped, KeyboardInterrupt)):
            # of several processes one may have been stopped by the others
            raise typer.Exit(128 + (self.signal or signal.SIGTERM)) from error
