"""Handling of Ctrl-C and SIGTERM while a command trains."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import typer

PATIENCE = 1.0  # seconds; torchrun forwards the terminal's Ctrl-C, so that it arrives twice


class Signals:
    """A context manager in which the first Ctrl-C or SIGTERM sets ``stop``, so that a fine-tune ends after a
    checkpoint, and the next Ctrl-C ends it at once. Either way, the exit code is 128 plus the signal's number."""

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
                # print is not reentrant, so a signal handler can't use it
                os.write(2, b"stopping after this update and a checkpoint; Ctrl-C stops at once, at the last one\n")
            self.stop.set()
        elif number == signal.SIGINT and time.monotonic() - self.since > PATIENCE:
            raise KeyboardInterrupt

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from ..finetune import Stopped

        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if isinstance(error, (Stopped, KeyboardInterrupt)):
            # a process may have been stopped by another one, without a signal of its own
            raise typer.Exit(128 + (self.signal or signal.SIGTERM)) from error
