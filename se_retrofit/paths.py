"""Checks of output files before the work rather than after it; and figures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RetrofitError, extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def writable(path: str | Path, *suffixes: str) -> Path:
    """Return a path to write to. Its folder must exist, and it must end in one of the suffixes, if any are given."""
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise RetrofitError(f"{path} does not end in {' or '.join(suffixes)}, which is what is written")
    if not path.parent.is_dir():
        raise RetrofitError(f"can't write {path}: there is no folder {path.parent}")
    return path


def new_figure(width: float, height: float) -> Figure:
    """Return an empty matplotlib figure of this size in inches; matplotlib is slow to import, and from an extra."""
    with extra("inspect"):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def drawable(path: str | Path) -> Path:
    """Return a path to draw to, whose folder must exist, and whose suffix must be one that matplotlib writes."""
    with extra("inspect"):
        from matplotlib.backend_bases import FigureCanvasBase

    path, formats = writable(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise RetrofitError(f"{path} has no suffix that matplotlib writes: {', '.join(formats)}")
    return path


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a matplotlib figure, and return its path; the suffix determines the format."""
    from .saving.atomic import replaced_file  # imports torch, which checking paths doesn't need

    path = drawable(path)
    with replaced_file(path) as fresh, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a character in a class name that the font lacks
        figure.savefig(fresh, dpi=120)
    return path


def as_written(name: str) -> str:
    """Escape a name for matplotlib: ``$...$`` would be a formula, and ``_name`` be left out of a legend."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")
