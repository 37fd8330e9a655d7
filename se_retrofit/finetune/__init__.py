"""Fine-tune retrofitted networks: ``finetune(model, train_data, val_data, config=FinetuneConfig(...))``.

Read ``train.py`` first: it is the training loop, top to bottom. What it calls is beside it, a file an idea:

- the run: ``config.py`` the recipe, ``setup.py`` what is made before the first step, ``run.py`` its state and what it comes to,
  ``checkpoint.py`` what is kept on disk, ``experiment.py`` which experiment a folder holds, ``log.py`` what a person sees, ``callbacks.py``
  the caller's own functions;
- data: ``data.py`` batches that come out the same after a kill, ``datasets.py`` data by name, ``targets.py`` labels, ``transforms.py``
  how images are prepared;
- the network: ``parts.py`` what is trained when, ``learning.py`` how fast and by what, ``criteria.py`` losses, ``engine.py`` devices and
  precision;
- what is asked of it: ``evaluation.py`` scores, ``predicting.py`` classes of new images, ``pictures.py`` images as it sees them, ``comparing.py`` whether SE helps, ``rates.py``
  the learning rate.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import extra

if TYPE_CHECKING:
    from .callbacks import Callbacks, Facts
    from .comparing import Comparison, Contrast, compare
    from .config import FinetuneConfig
    from .criteria import FocalLoss
    from .datasets import NamedData, Split, load_data, load_split
    from .evaluation import Evaluation, evaluate
    from .learning import param_groups
    from .parts import new_head
    from .pictures import show_batch
    from .predicting import Prediction, predict
    from .rates import LearningRates, find_lr
    from .run import FinetuneResult, Stopped
    from .train import finetune
    from .transforms import transform_of

# Imported when they are first used: the command line reads the recipe's fields, and needs no torch for it
_MODULES = {
    "callbacks": ("Callbacks", "Facts"),
    "comparing": ("Comparison", "Contrast", "compare"),
    "config": ("FinetuneConfig",),
    "criteria": ("FocalLoss",),
    "datasets": ("NamedData", "Split", "load_data", "load_split"),
    "evaluation": ("Evaluation", "evaluate"),
    "learning": ("param_groups",),
    "parts": ("new_head",),
    "pictures": ("show_batch",),
    "predicting": ("Prediction", "predict"),
    "rates": ("LearningRates", "find_lr"),
    "run": ("FinetuneResult", "Stopped"),
    "train": ("finetune",),
    "transforms": ("transform_of",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Callbacks",
    "Comparison",
    "Contrast",
    "Evaluation",
    "Facts",
    "FinetuneConfig",
    "FinetuneResult",
    "FocalLoss",
    "LearningRates",
    "NamedData",
    "Prediction",
    "Split",
    "Stopped",
    "compare",
    "evaluate",
    "find_lr",
    "finetune",
    "load_data",
    "load_split",
    "new_head",
    "param_groups",
    "predict",
    "show_batch",
    "transform_of",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("finetune"):
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
