"""Retrofit Squeeze-and-Excitation into existing convolutional networks, without changing anything else about them.

>>> import timm
>>> from se_retrofit import add_se
>>> model = add_se(timm.create_model("resnet18"), reduction=8)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import SEAttention
    from .errors import RetrofitError
    from .exporting import export
    from .folding import fold_se, from_native, to_native
    from .fusion import fuse_se
    from .inspection.inspection import inspect_se
    from .plan import Plan
    from .retrofit import InsertSE, add_se, has_se, plan_of, plan_se, remove_se
    from .saving import load_retrofitted, save_retrofitted
    from .surgery.record.runs import record

__version__ = "0.2.0"

# Imported on first use, so that what doesn't need torch (the version, a usage error) doesn't wait for it.
_MODULES = {
    "attention": ("SEAttention",),
    "errors": ("RetrofitError",),
    "exporting": ("export",),
    "folding": ("fold_se", "from_native", "to_native"),
    "fusion": ("fuse_se",),
    "inspection": ("inspect_se",),
    "plan": ("Plan",),
    "retrofit": ("InsertSE", "add_se", "has_se", "plan_of", "plan_se", "remove_se"),
    "surgery.record.runs": ("record",),
    "saving": ("load_retrofitted", "save_retrofitted"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "InsertSE",
    "Plan",
    "RetrofitError",
    "SEAttention",
    "add_se",
    "export",
    "fold_se",
    "from_native",
    "fuse_se",
    "has_se",
    "inspect_se",
    "load_retrofitted",
    "plan_of",
    "plan_se",
    "record",
    "remove_se",
    "save_retrofitted",
    "to_native",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
