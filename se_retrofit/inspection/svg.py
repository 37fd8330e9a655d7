"""The elements of pictures as SVG: boxes, joins, arrows and text. ``drawing.css`` colours their classes, in light and
dark mode."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files

RADIUS = 13  # radius of a join
LETTER, BOLD = 6.0, 7.4  # maximum width of a letter in small and in large print
TIP = 6


@dataclass(frozen=True)
class Picture:
    """The elements of a picture, and its size."""

    width: float
    height: float
    parts: tuple[str, ...]

    def svg(self, label: str, at: tuple[float, float] | None = None, style: str = "") -> str:
        """Return the picture as an ``<svg>`` element, on its own or at a position in another one."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        place = "" if at is None else f' x="{at[0]:.0f}" y="{at[1]:.0f}"'
        style = style and f' style="{style}"'
        return f'<svg class="drawing" role="img" aria-label="{escape(label)}" {size}{place}{style}>{"".join(self.parts)}</svg>'


def file_of(picture: Picture, label: str) -> str:
    """Return a picture as the text of a file, in light colours that also work in programs without CSS variables."""
    css = files(__package__).joinpath("drawing.css").read_text(encoding="utf-8")
    light, rules = css[: css.index("}")], css[css.index(".drawing {") :]
    colours = dict(re.findall(r"(--[\w-]+): (#\w+)", light))
    rules = re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], rules)
    paper = '<rect class="paper" width="100%" height="100%"/>'
    element = Picture(picture.width, picture.height, (f"<style>{rules}</style>", paper, *picture.parts)).svg(label)
    return element.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def text(cls: str, x: float, y: float, words: str) -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def box(
    cls: str, x: float, y: float, width: float, height: float, lines: Iterable[str], tip: str, mark: str = ""
) -> str:
    """Draw a box with a name, details in smaller letters, a tooltip, and a mark in an orange badge."""
    name, *more = lines
    middle = y + height / 2
    words = [text("name", x + 9, middle + (-3 if more else 4), name)]
    words += [text("words", x + 9, middle + 10, line) for line in more]
    if mark:
        wide = badge_width(mark)
        left = x + width - wide - 6
        words.append(f'<rect class="badge" x="{left:.1f}" y="{middle - 8:.1f}" width="{wide}" height="16" rx="8"/>')
        words.append(text("badge", left + wide / 2, middle + 4, mark))
    rect = f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="7"/>'
    return f'<g class="{cls}"><title>{escape(tip)}</title>{rect}{"".join(words)}</g>'


def badge_width(mark: str) -> int:
    return 9 + 7 * len(mark) if mark else 0


def join(x: float, y: float, sign: str, tip: str) -> str:
    """Draw a circle where values are added, multiplied or concatenated; its centre is at ``x``, ``y``."""
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
    return f'<g class="join"><title>{escape(tip)}</title>{circle}{text("sign", x, y + 4, sign)}</g>'


def arrow(cls: str, path: str, x: float, y: float, *, down: bool = False) -> str:
    """Draw a line with an arrowhead at ``x``, ``y`` that points to the right or down."""
    back, side = (-TIP, TIP // 2)
    head = f"M{x:.1f},{y:.1f} l{-side},{back} h{TIP} z" if down else f"M{x:.1f},{y:.1f} l{back},{-side} v{TIP} z"
    return f'<path class="{cls}" d="{path}"/><path class="{cls} tip" d="{head}"/>'


def times(shape: Iterable[int]) -> str:
    """Format a shape: ``256×56×56``."""
    return "\u00d7".join(map(str, shape))
