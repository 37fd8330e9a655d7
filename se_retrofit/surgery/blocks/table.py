"""The table of block kinds: one function and one row for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..record.graph import Record
from .block import Block
from .chains import lone_convolutions, plain_chains
from .dense import dense_layers, dual_paths, split_units
from .inverted import inverted_bottlenecks
from .multi_branch import multi_branch_blocks
from .rep_sum import reparameterisable_sums
from .residual import parallel_branches, residual_units, reversible_units

Recognise = Callable[[Record], Iterable[Block]]


@dataclass(frozen=True)
class Recogniser:
    """A row of the table.

    Attributes:
        find: yields the blocks of a record, without regard to other recognisers.
        nests: whether its blocks may contain others: among nested blocks, the innermost gets SE. Consecutive rows of
            this sort are evaluated together.
        alone: whether its blocks count in a network that has hardly any others.
        aside: if it is not empty, its blocks count only if ``include`` names them, or if they are alone; this is the
            reason that is given otherwise.
    """

    find: Recognise
    nests: bool = False
    alone: bool = False
    aside: str = ""


# The order matters: what one recogniser has found is ignored by those after it.
RECOGNISERS: list[Recogniser] = [
    Recogniser(dense_layers, nests=True),
    Recogniser(reversible_units, nests=True),
    Recogniser(residual_units, nests=True),
    Recogniser(parallel_branches, nests=True),
    Recogniser(split_units, nests=True),
    Recogniser(dual_paths, nests=True),
    Recogniser(inverted_bottlenecks),
    Recogniser(multi_branch_blocks),
    Recogniser(reparameterisable_sums),
    Recogniser(plain_chains, alone=True, aside="a plain chain beside other blocks: name it in include"),
    Recogniser(lone_convolutions, aside="a convolution without a non-linearity: name it in include"),
]
