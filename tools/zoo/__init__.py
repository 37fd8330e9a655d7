"""Every network of torchvision and timm by name, retrofitted and checked, one row each.

- ``names``: which networks there are, of which family, and how to build one without memory.
- ``check``: retrofit one network, check what can be checked without data, and say how it went.
- ``walk``: the same for many, each in a process that may crash or hang without harm.
- ``tables``: the rows as CSV and as Markdown.
- ``last_run``: when all of them were last walked, and what has changed since.
"""

from .check import Row, check
from .last_run import FullRun, changed_since, present_run, read_run
from .names import Entry, entries
from .tables import read_rows, smallest, structure, write_markdown
from .walk import walk

__all__ = [
    "Entry", "FullRun", "Row", "changed_since", "check", "entries", "present_run", "read_rows", "read_run", "smallest",
    "structure", "walk", "write_markdown",
]  # fmt: skip
