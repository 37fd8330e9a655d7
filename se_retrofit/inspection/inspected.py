"""A retrofitted model with one record of it and its blocks with SE, on which all views of an inspection are based."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import RetrofitError
from ..plan import Plan
from ..surgery.record.graph import Record
from ..tables import few
from .blocks import BlockPair


@dataclass(eq=False, repr=False)
class Inspected:
    """A model, its plan, the record of one run, and its blocks with SE, in the order of the plan."""

    model: nn.Module
    plan: Plan
    record: Record
    blocks: list[BlockPair]

    def distinct(self) -> list[list[BlockPair]]:
        """Return the blocks in groups of the same structure, each starting with the most telling one: among dense
        layers, the first that takes several feature maps."""
        groups: dict[tuple[Any, ...], list[BlockPair]] = {}
        for block in self.blocks:
            groups.setdefault(block.signature(), []).append(block)
        return [sorted(group, key=lambda pair: pair.inputs < 2) for group in groups.values()]

    def block(self, path: str) -> BlockPair:
        """Return a block, which has a ``before.graph``, an ``after.graph`` and its ``sites``.

        Raises:
            RetrofitError: If there is no such block.
        """
        exact = [pair for pair in self.blocks if path == pair.path or path in [site.path for site in pair.sites]]
        known = path and path in dict(self.model.named_modules())
        around = [pair for pair in self.blocks if known and pair.path and path.startswith(f"{pair.path}.")]
        within = [pair for pair in self.blocks if known and pair.path.startswith(f"{path}.")]
        if exact or around:
            return exact[0] if exact else max(around, key=lambda pair: len(pair.path))
        if len(within) == 1:
            return within[0]
        there = few((pair.path for pair in within or self.blocks), 6)
        if within:
            raise RetrofitError(f"{len(within)} blocks with SE are in {path!r}, name one: {there}")
        raise RetrofitError(f"no block with SE that runs on these inputs is {path!r}; those that do are {there}")
