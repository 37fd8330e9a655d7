"""Folding of constant SE into the weights around it, and conversion of SE to and from the form of other libraries."""

from .fold import fold_se
from .native import from_native, to_native
from .result import FoldedSite, FoldReport

__all__ = ["FoldReport", "FoldedSite", "fold_se", "from_native", "to_native"]
