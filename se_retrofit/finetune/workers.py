"""Data-loading processes that survive signals but never outlive the main process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

from ..errors import RetrofitError

LOOK = 1.0  # seconds between two checks of the main process


def begin_worker(worker: int) -> None:
    """Initialise a data-loading process; the ``worker_init_fn`` of a DataLoader.

    Ctrl-C reaches all processes of a terminal, and a scheduler's SIGTERM all processes of a job. The main process
    finishes its update, for which it needs the loading processes, so they only end by its own SIGTERM, which is how
    multiprocessing ends them, or when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    """End when the main process is gone. PyTorch's own watchdog starts later, and may miss that."""
    main = multiprocessing.parent_process()
    while main is not None and main.is_alive():
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(LOOK)
            continue
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK)
        if told is not None and told.si_pid == main.pid:  # not os.getppid(), which may be a fork server
            break
    os._exit(0)


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Raise our errors from a loading process as if they occurred here, without the traceback that PyTorch adds."""
    try:
        yield
    except RetrofitError as error:
        text = str(error)
        if "Original Traceback" not in text:
            raise
        raise RetrofitError(text.rsplit("RetrofitError: ", 1)[-1].strip()) from error
