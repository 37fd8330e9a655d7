"""Files and folders that are written completely or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import RetrofitError
from ..tables import few

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replaced_directory(path: Path, ours: Collection[str]) -> Iterator[Path]:
    """Provide a new folder beside ``path`` to fill, which replaces ``path`` on exit. Processes that replace folders at
    the same place do so one after the other.

    The two renames are not atomic: between them, ``path`` is missing, and ``settled`` finds the previous folder.

    Args:
        path: the folder to create or replace.
        ours: the file names that a folder of this kind may hold.

    Raises:
        RetrofitError: As for ``check_replaceable``, or if ``path`` can't be written. What was at ``path`` is kept.
    """
    fresh, aside = _beside(path, "new"), _beside(path, "previous")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            try:
                if aside.exists() and not path.exists():
                    aside.rename(path)
                check_replaceable(path, ours)
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                yield fresh
                for file in fresh.iterdir():
                    sync(file)
                sync(fresh)
                shutil.rmtree(aside, ignore_errors=True)
                if path.exists():
                    path.rename(aside)
                fresh.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
                sync(path.parent)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
                if aside.exists() and not path.exists():
                    aside.rename(path)
    except OSError as error:
        kept = "; what was there before is untouched" if path.exists() else ""
        raise RetrofitError(f"{path} can't be written: {error.strerror or error}{kept}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process has locked a folder, and lock it, on systems and disks that can."""
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


def check_replaceable(path: Path, ours: Collection[str]) -> None:
    """Raise an error if a folder can't be replaced: it is a file or ``.``, can't be read, or holds other files."""
    if path.name in ("", ".."):
        raise RetrofitError(f"'{path}' can't be replaced as a whole; give the name of a folder in it")
    if path.exists() and not path.is_dir():
        raise RetrofitError(f"{path} is a file; give the path of a folder")
    try:
        foreign = sorted(f.name for f in path.iterdir() if f.name not in ours) if path.exists() else []
    except OSError as error:
        raise RetrofitError(f"{path} can't be read: {error.strerror or error}") from error
    if foreign:
        raise RetrofitError(f"{path} holds other files ({few(foreign)}), which would be lost; give a new folder")


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Provide a new file beside ``path`` to write to, which replaces ``path`` on exit unless an error is raised."""
    # The suffix is kept for writers that depend on it (matplotlib).
    fresh = path.parent / f".{path.stem}.new{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        sync(fresh)
        os.replace(fresh, path)
    except OSError as error:
        raise RetrofitError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, not even what is missing can be removed
            fresh.unlink(missing_ok=True)


def settled(path: Path) -> Path:
    """Return the folder to read: ``path``, or the previous folder if the process was killed between the two renames."""
    aside = _beside(path, "previous")
    return aside if aside.is_dir() and not path.exists() else path


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows can't open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, suffix: str) -> Path:
    whole = Path(os.path.abspath(path))  # "." has no name
    return whole.parent / f".{whole.name}.{suffix}"
