"""Lines of text with a mark in the margin of those about SE: plain in a pipe, coloured in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SE_STYLE = "bold dark_orange"


@dataclass(frozen=True)
class Line:
    """A line of text; ``se`` marks it in the margin, ``style`` is a style of rich."""

    text: str
    se: bool = False
    style: str = ""

    def __str__(self) -> str:
        return (("> " if self.se else "  ") + self.text).rstrip()


class Lines(tuple[Line, ...]):
    """Lines that form one text: ``str`` returns it without colours, ``show`` prints it."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def __repr__(self) -> str:
        return str(self)

    def show(self, file: IO[str] | None = None, console: Console | None = None) -> None:
        """Print to a file (default: standard output), in colour if rich is installed and the file is a terminal."""
        try:
            from rich.console import Console
            from rich.text import Text
        except ModuleNotFoundError:
            print(self, file=file)
            return
        console = console or Console(file=file)
        for line in self:
            style = line.style or (SE_STYLE if line.se else "")
            console.print(Text(str(line), style=style), soft_wrap=True)
