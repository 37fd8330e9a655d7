"""Looking inside a retrofitted network: what was changed, in words, code, numbers and pictures."""

from typing import TYPE_CHECKING

from .blocks import BlockGraph, BlockPair
from .difference import difference, print_difference
from .excitations import Excitations, excitations
from .gate_log import GateLogger, GateSummary, plot_gates
from .graphs import block_graphs
from .printing import print_graph
from .report import Report, report

if TYPE_CHECKING:
    from .drawing import draw
    from .page import write_page

__all__ = [
    "BlockGraph",
    "BlockPair",
    "Excitations",
    "GateLogger",
    "GateSummary",
    "Report",
    "block_graphs",
    "difference",
    "draw",
    "excitations",
    "plot_gates",
    "print_difference",
    "print_graph",
    "report",
    "write_page",
]


def __getattr__(name: str) -> object:
    # they need packages of the extra "inspect", which the others do without
    if name == "draw":
        from .drawing import draw

        return draw
    if name == "write_page":
        from .page import write_page

        return write_page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
