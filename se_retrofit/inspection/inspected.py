"""A retrofitted model with one record of it and its blocks with SE: what all views of an inspection are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import RetrofitError
from ..plan import Plan
from ..surgery.record.graph import Record
from ..tables import few
from .blocks import BlockPair

__all__ = ["Inspected"]


@dataclass(eq=False, repr=False)
class Inspected:
    """A model, its plan, the record of one run, and its blocks with SE, in the order of the plan."""

    model: nn.Module
    plan: Plan
    record: Record
    blocks: list[BlockPair]

    def distinct(self) -> list[list[BlockPair]]:
        """The blocks in groups of the same structure, the one that shows it best first: of dense layers, the first that
        is given several feature maps."""
        groups: dict[tuple[Any, ...], list[BlockPair]] = {}
        for block in self.blocks:
            groups.setdefault(block.signature(), []).append(block)
        return [sorted(group, key=lambda pair: pair.inputs < 2) for group in groups.values()]

    def block(self, path: str) -> BlockPair:
        """A block: its ``before.graph`` and ``after.graph``, and its ``sites``.

        Raises:
            RetrofitError: there is no such block.
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
