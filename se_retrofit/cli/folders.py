"""Folders that commands take: saved networks, and runs with one in them."""

from __future__ import annotations

from pathlib import Path

from ..errors import RetrofitError

__all__ = ["network_in"]


def network_in(folder: Path) -> Path:
    """The folder itself, or its ``best/`` where it is a run's.

    Raises:
        RetrofitError: it is neither.
    """
    from ..saving.atomic import settled
    from ..saving.recipe import RECIPE

    for candidate in (folder, folder / "best"):
        if (settled(candidate) / RECIPE).is_file():
            return candidate
    what = "holds no network that convert, finetune or fold wrote" if folder.is_dir() else "is no folder"
    raise RetrofitError(f"{folder} {what}; {RECIPE} is looked for in it and in {folder / 'best'}")
