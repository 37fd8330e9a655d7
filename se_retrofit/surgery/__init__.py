"""The surgery: record a run, find the blocks, splice SE in, and check the result.

This module exports what a custom recogniser needs: it is a function from a ``Record`` to ``Block``s.
"""

from .blocks.block import Block, Target
from .blocks.placements import PLACEMENTS
from .blocks.table import RECOGNISERS, Recogniser
from .record.graph import Call, Op, Record

__all__ = ["PLACEMENTS", "RECOGNISERS", "Block", "Call", "Op", "Recogniser", "Record", "Target"]
