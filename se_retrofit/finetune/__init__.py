"""Fine-tune retrofitted networks: ``finetune(model, train_data, val_data, config=FinetuneConfig(...))``.

Read ``train.py`` first: it is the training loop, top to bottom. What it calls is beside it, a file an idea:
``setup.py`` what is made before the first step, ``run.py`` the state of a run, ``result.py`` what it comes to, ``evaluation.py`` scores, ``predicting.py`` classes of new images, ``criteria.py`` losses,
``targets.py`` what a data set's labels are, ``config.py`` the recipe, ``data.py`` batches that come out the same after a kill, ``datasets.py`` data by name,
``splits.py`` which part of it is evaluated,
``parts.py`` the parts of a network, ``groups.py`` how fast each learns, ``optimizing.py`` by which optimizer,
``freezing.py`` which of them are trained when,
``form.py`` as what it is trained, ``engine.py`` devices and precision, ``checkpoint.py`` what is kept on disk, ``log.py`` what
a person sees, ``gates.py`` what SE's gates did in each epoch, ``compare.py`` the question whether SE helps,
``rates.py`` the learning-rate finder, ``experiment.py`` which experiment a folder holds, ``callbacks.py`` the caller's own functions.
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
