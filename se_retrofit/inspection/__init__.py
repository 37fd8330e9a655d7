"""Looking inside a retrofitted network: what was changed, in words, code, numbers and pictures."""

from .blocks import BlockGraph, BlockPair
from .excitations import Excitations, excitations
from .gate_log import GateLogger, GateSummary, plot_gates
from .inspection import Inspection, draw, inspect, print_graph, report
from .report import Report

__all__ = [
    "BlockGraph",
    "BlockPair",
    "Excitations",
    "GateLogger",
    "GateSummary",
    "Inspection",
    "Report",
    "draw",
    "excitations",
    "inspect",
    "plot_gates",
    "print_graph",
    "report",
]
