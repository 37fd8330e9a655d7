"""Every network of torchvision and timm by name, retrofitted and checked, one row each.

- ``names``: which networks there are, of which family, and how to build one without memory.
- ``check``: retrofit one network, check what can be checked without data, and say how it went.
- ``walk``: the same for many, each in a process that may crash or hang without harm.
- ``tables``: the rows as CSV and as Markdown.
"""

from .check import Row, check
from .names import Entry, entries
from .tables import read_rows, write_markdown
from .walk import walk

__all__ = ["Entry", "Row", "check", "entries", "read_rows", "walk", "write_markdown"]
