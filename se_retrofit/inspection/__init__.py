"""Inspection of a retrofitted network: what was changed, in words, code, numbers and pictures."""

from .blocks import BlockGraph, BlockPair
from .excitations import Excitations, excitations
from .gate_plots import plot_gates
from .gates import GateLogger, SiteGates
from .inspection import Inspection, inspect_se
from .report import Report

__all__ = [
    "BlockGraph",
    "BlockPair",
    "Excitations",
    "GateLogger",
    "Inspection",
    "Report",
    "SiteGates",
    "excitations",
    "inspect_se",
    "plot_gates",
]
