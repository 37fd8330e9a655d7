"""SE that has become constant goes into the weights around it; SE that stays takes the form that others know."""

from .fold import fold_se
from .native import from_native, to_native
from .result import FoldedSite, FoldReport

__all__ = ["FoldReport", "FoldedSite", "fold_se", "from_native", "to_native"]
