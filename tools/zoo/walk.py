"""Check many networks, each in a process of its own kind: a crash or a hang is that network's row, and no more.

``concurrent.futures`` gives up the whole pool when one of its processes dies and can't end one that hangs, so the few
lines that it takes to do without it are here.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import torch

from .check import FAILED, Row, check
from .names import Entry

Checker = Callable[[Entry], Row]


def walk(
    todo: Sequence[Entry],
    jobs: int = 1,
    timeout: float = 300.0,
    startup: float = 120.0,
    checker: Checker = check,
) -> Iterator[Row]:
    """Check networks in parallel and yield each one's row as soon as it is there.

    Args:
        todo: which ones.
        jobs: how many processes; each uses one thread.
        timeout: seconds that one network may take; then its process is ended and its row says so.
        startup: seconds more for the first network of a process, which has to import the libraries.
        checker: what is done with each; a function that processes can import.

    Yields:
        One row for each entry, in the order in which they end.

    Example:
        >>> from tools.zoo import entries, walk
        >>> [row.verdict for row in walk(entries(["torchvision/alexnet"]))]
        ['converted']
    """
    waiting = deque(todo)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(checker, timeout, startup))
                workers[-1].begin(waiting.popleft())
            nearest = min(worker.deadline for worker in workers) - time.monotonic()
            wait([worker.connection for worker in workers], timeout=max(0.0, nearest))
            for worker in list(workers):
                row = worker.result()
                if row is None:
                    continue
                yield row
                if worker.alive and waiting:
                    worker.begin(waiting.popleft())
                else:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that checks one network at a time, and the network that it has at present."""

    def __init__(self, checker: Checker, timeout: float, startup: float) -> None:
        # a fresh interpreter: a forked one would inherit torch's threads and locks
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, checker), daemon=True)
        self.process.start()
        theirs.close()
        self.timeout = timeout
        self.startup = startup
        self.alive = True

    def begin(self, entry: Entry) -> None:
        self.entry = entry
        self.started = time.monotonic()
        self.deadline = self.started + self.timeout + self.startup
        with suppress(OSError):  # it has died already: result() sees that
            self.connection.send(entry)

    def result(self) -> Row | None:
        """The row of the present network, if there is one by now."""
        if self.connection.poll():
            try:
                row: Row = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(10)
                self.alive = False
                return self._failed(f"its process died with exit code {self.process.exitcode}")
            self.startup = 0.0
            return row
        if time.monotonic() >= self.deadline:
            self.alive = False
            return self._failed(f"timed out after {self.timeout:g} s")
        return None

    def _failed(self, reason: str) -> Row:
        seconds = time.monotonic() - self.started
        return Row(self.entry.name, self.entry.family, FAILED + reason, seconds=seconds)

    def end(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def _serve(connection: Connection, checker: Checker) -> None:
    """What a worker does: check networks until the other end hangs up."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the libraries warn a great deal while they build networks
    while True:
        try:
            entry = connection.recv()
        except EOFError:
            return
        connection.send(checker(entry))
