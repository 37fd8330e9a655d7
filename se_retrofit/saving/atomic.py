"""Files and folders that are written completely or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import RetrofitError
from ..locks import abandoned, in_turn
from ..tables import few

NEW = ".se-retrofit-new-"


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
    real, fresh, aside = _real(path), _beside(path, "new"), _beside(path, "previous")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(real.parent):
            try:
                if aside.exists() and not path.exists():
                    aside.rename(real)
                check_replaceable(path, ours)
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                yield fresh
                for file in fresh.iterdir():
                    sync(file)
                sync(fresh)
                shutil.rmtree(aside, ignore_errors=True)
                if path.exists():
                    real.rename(aside)
                fresh.rename(real)
                shutil.rmtree(aside, ignore_errors=True)
                sync(real.parent)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
                if aside.exists() and not path.exists():
                    aside.rename(real)
    except OSError as error:
        kept = "; what was there before is untouched" if path.exists() else ""
        raise RetrofitError(f"{path} can't be written: {error.strerror or error}{kept}") from error


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
    """Provide a new file of the same name to write to, which replaces ``path`` on exit, as do files written beside it.
    It is in a folder of its own, because others may be writing to ``path``, too. What killed processes left is removed.

    Raises:
        RetrofitError: If the file can't be written. What was at ``path`` is kept.
    """
    try:
        if path.is_char_device() or path.is_fifo():  # /dev/stdout must stay what it is
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{NEW}*"):
            with contextlib.suppress(FileNotFoundError):  # that of a write which has just ended
                if any(left.iterdir()) and abandoned(left):  # an empty one may be about to be locked
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=NEW, dir=path.parent) as folder, in_turn(Path(folder)):
            yield Path(folder, path.name)
            for file in sorted(Path(folder).iterdir()):
                sync(file)
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise RetrofitError(f"{path} can't be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all, as ``replaced_file`` does."""
    with replaced_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


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


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # "." has no name, and a link stays a link


def _beside(path: Path, suffix: str) -> Path:
    real = _real(path)
    return real.parent / f".{real.name}.{suffix}"
