"""Fine-tune retrofitted networks: ``finetune(model, train_data, val_data, config=FinetuneConfig(...))``.

Start with ``train.py``, the training loop from top to bottom. The files beside it hold what it calls, one idea each:

- the run: ``config.py`` (the recipe), ``setup.py`` (everything before the first step), ``run.py`` (its state and
  result), ``checkpoint.py`` (files on disk), ``experiment.py`` (which experiment a folder holds), ``log.py`` (printed
  output) and ``callbacks.py`` (the caller's functions);
- the data: ``data.py`` (batches that are the same after a restart), ``datasets.py`` (data by name), ``targets.py``
  (labels) and ``transforms.py`` (how images are prepared);
- the network: ``parts.py`` (what is trained when), ``learning.py`` (optimizer and learning rates), ``criteria.py``
  (losses) and ``engine.py`` (devices and precision);
- tools: ``evaluation.py`` (scores), ``predicting.py`` (classes of new images), ``pictures.py`` (images as the network
  sees them), ``comparing.py`` (whether SE helps) and ``rates.py`` (finding a learning rate).
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

# Imported on first use: the command line reads the recipe's fields, which doesn't need torch
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
