"""SE that has become constant goes into the weights around it."""

from .fold import fold_se
from .result import FoldedSite, FoldReport

__all__ = ["FoldReport", "FoldedSite", "fold_se"]
