"""The modules that are inserted: Squeeze-and-Excitation and other attentions, and a wrapper for any other module."""

from .cbam import CBAM
from .eca import ECA
from .from_identity import FromIdentity
from .inserted import Inserted, Slot, check_gates, has_gates
from .parts import TwiceSigmoid, scale, squeeze
from .se import GATES, SEAttention, check_options
from .static import StaticFactor
from .table import ATTENTIONS, Attention, built, check_attention, name_of

__all__ = [
    "ATTENTIONS",
    "CBAM",
    "ECA",
    "GATES",
    "Attention",
    "FromIdentity",
    "Inserted",
    "SEAttention",
    "Slot",
    "StaticFactor",
    "TwiceSigmoid",
    "built",
    "check_attention",
    "check_gates",
    "check_options",
    "has_gates",
    "name_of",
    "scale",
    "squeeze",
]
