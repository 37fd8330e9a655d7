"""Looking inside a retrofitted network: what was changed, in words, code, numbers and pictures."""

from .difference import difference, print_difference
from .graphs import BlockGraph, BlockPair, block_graphs
from .printing import print_graph
from .report import Report, report

__all__ = [
    "BlockGraph",
    "BlockPair",
    "Report",
    "block_graphs",
    "difference",
    "print_difference",
    "print_graph",
    "report",
]
