"""Locks on folders, between processes, on systems and disks that have them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import RetrofitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".running"


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until nobody else, in this process or another one, is in turn in a folder."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for children that were forked meanwhile
        os.close(handle)


def abandoned(folder: Path) -> bool:
    """Return whether nobody is in turn in a folder any more; False on a file system without locks."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Keep other processes out of a folder, if there is one. The loading processes don't inherit the lock."""
    if fcntl is None or folder is None:
        yield
        return
    file = folder / LOCK
    handle = _locked(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def _locked(file: Path) -> int:
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RetrofitError(f"{file.parent} can't be written: {error.strerror}") from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # which one depends on the system
            os.close(handle)
            raise RetrofitError(
                f"another process is running in {file.parent}; wait until it has ended, or give another folder"
            ) from error
        except OSError:  # a file system without locks
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file), os.fstat(handle)):
                return handle
        os.close(handle)  # removed by a run that ended between the two calls
