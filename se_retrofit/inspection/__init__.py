"""Looking inside a retrofitted network: what was changed, in words, code, numbers and pictures."""

from .difference import difference, print_difference
from .drawing import draw
from .excitations import Excitations, excitations
from .graphs import BlockGraph, BlockPair, block_graphs
from .page import write_page
from .printing import print_graph
from .report import Report, report

__all__ = [
    "BlockGraph",
    "BlockPair",
    "Excitations",
    "Report",
    "block_graphs",
    "difference",
    "draw",
    "excitations",
    "print_difference",
    "print_graph",
    "report",
    "write_page",
]
