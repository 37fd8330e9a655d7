"""Looking inside a retrofitted network: what was changed, in words, code, numbers and pictures."""

from .blocks import BlockGraph, BlockPair
from .excitations import Excitations, excitations
from .gate_log import GateLogger, GateSummary, plot_gates
from .inspection import Inspection, inspect_se
from .report import Report

__all__ = [
    "BlockGraph",
    "BlockPair",
    "Excitations",
    "GateLogger",
    "GateSummary",
    "Inspection",
    "Report",
    "excitations",
    "inspect_se",
    "plot_gates",
]
