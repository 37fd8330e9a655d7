"""Finding the convolutional blocks of a record, and where SE goes in each.

One principle: SE recalibrates what the block has newly computed, once, at the last value before it joins what bypassed
the block (Hu et al., sections 3.3 and 6.4). Blocks are recognised by what their graphs do, never by a name.
"""

from .block import Block, Found, Place, Target
from .find import find_places, places_at
from .left import left_out
from .placements import PLACEMENTS
from .questions import is_gate
from .table import RECOGNISERS, Recognise, Recogniser

__all__ = [
    "PLACEMENTS",
    "RECOGNISERS",
    "Block",
    "Found",
    "Place",
    "Recognise",
    "Recogniser",
    "Target",
    "find_places",
    "is_gate",
    "left_out",
    "places_at",
]
