"""Fine-tune retrofitted networks: ``finetune(model, train_data, val_data, config=FinetuneConfig(...))``.

Read ``train.py`` first: it is the training loop, top to bottom. What it calls is beside it, a file an idea:

- the run: ``config.py`` the recipe, ``setup.py`` what is made before the first step, ``run.py`` its state, ``result.py`` what it comes to,
  ``checkpoint.py`` what is kept on disk, ``experiment.py`` which experiment a folder holds, ``log.py`` what a person sees, ``callbacks.py``
  the caller's own functions;
- data: ``data.py`` batches that come out the same after a kill, ``datasets.py`` data by name, ``splits.py`` which part of it is evaluated,
  ``targets.py`` labels, ``transforms.py`` how images are prepared;
- the network: ``parts.py``, ``freezing.py`` what is trained when, ``groups.py`` how fast, ``optimizing.py`` by what, ``criteria.py`` losses,
  ``form.py`` as what it is trained, ``engine.py`` devices and precision, ``gates.py`` what SE's gates did;
- what is asked of it: ``evaluation.py`` scores, ``predicting.py`` classes of new images, ``compare.py`` whether SE helps, ``rates.py`` the
  learning rate.
"""

from ..errors import extra

with extra("finetune"):
    from .callbacks import Callbacks, Facts
    from .compare import Comparison, Contrast, compare
    from .config import FinetuneConfig
    from .criteria import FocalLoss
    from .datasets import NamedData, load_data
    from .evaluation import Evaluation, evaluate
    from .parts import new_head
    from .predicting import Prediction, predict
    from .rates import LearningRates, find_lr
    from .result import FinetuneResult
    from .run import Stopped
    from .splits import Split, load_split
    from .train import finetune
    from .transforms import transform_of

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
    "predict",
    "transform_of",
]
