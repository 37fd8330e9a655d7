"""Retrofit Squeeze-and-Excitation into existing convolutional networks, without changing anything else about them.

>>> import timm
>>> from se_retrofit import add_se
>>> model = add_se(timm.create_model("resnet18"), reduction=8)
"""

from .attention import SEAttention
from .errors import RetrofitError
from .fusion import Fusion, fuse_se, plan_fusion, unfuse_se
from .plan import Plan, Site, Skipped
from .retrofit import InsertSE, add_se, has_se, plan_of, plan_se, remove_se
from .saving import load_retrofitted, load_se, save_retrofitted, save_se

_INSPECTION = ("draw", "excitations", "print_graph", "report")


def __getattr__(name: str) -> object:
    if name in _INSPECTION:  # imported when it is used
        from . import inspection

        return getattr(inspection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.2.0"

__all__ = [
    "Fusion",
    "InsertSE",
    "Plan",
    "RetrofitError",
    "SEAttention",
    "Site",
    "Skipped",
    "add_se",
    "draw",
    "excitations",
    "fuse_se",
    "has_se",
    "load_retrofitted",
    "load_se",
    "plan_fusion",
    "plan_of",
    "plan_se",
    "print_graph",
    "remove_se",
    "report",
    "save_retrofitted",
    "save_se",
    "unfuse_se",
]
