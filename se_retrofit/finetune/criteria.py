"""Losses: cross-entropy, binary cross-entropy, the focal loss, the caller's own, and distillation from a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from ..errors import RetrofitError, brief, check_module
from .config import FinetuneConfig
from .targets import class_counts

Criterion = Callable[[Tensor, Tensor], Tensor]
FOCAL_GAMMA = 2.0  # as in the paper
AUXILIARY_WEIGHT = 0.3  # for the auxiliary losses of GoogLeNet and Inception, as in the papers


@dataclass(frozen=True)
class Losses:
    """The loss: a criterion, and the distance to a teacher's outputs, with its share and the temperature."""

    criterion: Criterion
    teacher: nn.Module | None
    distillation: tuple[float, float]
    multi_label: bool

    def __call__(self, logits: Tensor, auxiliary: list[Tensor], labels: Tensor, taught: Tensor | None) -> Tensor:
        """Return the loss of a batch; ``taught`` holds the teacher's logits for it."""
        loss = checked_loss(self.criterion(logits, labels))
        for more in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * checked_loss(self.criterion(more, labels))
        if taught is None:
            return loss
        part, temperature = self.distillation
        return (1 - part) * loss + part * distillation_loss(logits, taught, temperature, self.multi_label)


class FocalLoss(nn.Module):
    """Cross-entropy in which images that are already classified well count less.

    ``loss = -(1 - p) ** gamma * log(p)`` with the probability ``p`` of the image's class (Lin et al., "Focal Loss for
    Dense Object Detection", https://arxiv.org/abs/1708.02002).

    Args:
        gamma: focusing parameter; 0 gives cross-entropy, and the paper uses 2.
        weight: weight of the images of each class, (classes,).
        label_smoothing: as in ``nn.CrossEntropyLoss``.

    Shape:
        Logits (N, classes) and class numbers (N,) or soft labels (N, classes), to a scalar, the mean; with ``weight``,
        the weighted mean.

    Example:
        >>> import torch
        >>> from se_retrofit.finetune.criteria import FocalLoss
        >>> logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        >>> torch.allclose(FocalLoss(gamma=0)(logits, targets), torch.nn.functional.cross_entropy(logits, targets))
        True
    """

    weight: Tensor | None

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        labels = targets if targets.dim() == 2 else F.one_hot(targets, logits.shape[1]).to(logits.dtype)
        # Each image is weighted by its own class. PyTorch's cross-entropy weights the smoothed labels instead, with
        # which a class of large weight would become the answer to every image.
        weights = logits.new_ones(len(logits)) if self.weight is None else labels @ self.weight.to(labels.dtype)
        if targets.dim() == 1:
            labels = labels * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        log_p = F.log_softmax(logits, dim=1)
        # for gamma below 1, the slope at 0 would be infinite
        wrong = (1 - log_p.exp()).clamp(min=torch.finfo(log_p.dtype).tiny)
        losses = (-labels * wrong**self.gamma * log_p).sum(1)
        return (weights * losses).sum() / weights.sum()


def criterion_of(config: FinetuneConfig, given: Criterion | None, train_data: Any, classes: int | None) -> Criterion:
    """Return the loss of a run: the caller's own, or that of the config."""
    if given is not None:
        return given
    # mixup smooths the labels itself; multi-label targets are not smoothed
    smoothing = 0.0 if config.mixup or config.cutmix or config.multi_label else config.label_smoothing
    weight = None
    if config.balance == "loss":
        counts, images = class_counts(train_data, classes, config.multi_label, config.keys)
        # for labels, the number of images without it over the number with it; for classes, scikit-learn's "balanced"
        few = counts.clamp(min=1)
        weight = (images - counts) / few if config.multi_label else images / (len(counts) * few)
    if config.loss == "cross_entropy" and weight is None:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    if config.loss == "bce":
        if config.multi_label:
            return nn.BCEWithLogitsLoss(pos_weight=weight)
        return BinaryCrossEntropy(smoothing=smoothing)
    if config.multi_label:
        return partial(sigmoid_focal_loss, alpha=-1, gamma=FOCAL_GAMMA, reduction="mean")
    gamma = FOCAL_GAMMA if config.loss == "focal" else 0.0  # which is cross-entropy
    return FocalLoss(gamma, weight, smoothing)


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """Return the divergence of the softened probabilities from the teacher's, times the squared temperature (Hinton et
    al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531)."""
    if logits.shape != taught.shape:
        raise RetrofitError(
            f"the teacher's logits are of shape {tuple(taught.shape)}, the network's of {tuple(logits.shape)}; "
            "the teacher must know the same classes"
        )
    logits, taught = logits.float() / temperature, taught.float() / temperature
    if multi_label:
        losses = F.binary_cross_entropy_with_logits(logits, taught.sigmoid(), reduction="none").mean(1)
    else:
        losses = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="none").sum(1)
    return losses.mean() * temperature**2


def checked_loss(loss: Any) -> Tensor:
    """Return the output of a criterion, or raise an error if a network can't learn from it."""
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
        return loss
    got = brief(loss) if not isinstance(loss, Tensor) else f"a tensor of shape {tuple(loss.shape)}"
    got += " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
    raise RetrofitError(
        f"the criterion must return the mean loss of the batch as a scalar tensor computed from the logits, got {got}"
    )


def check_criterion(given: Any, teacher: Any, distillation: tuple[float, float], model: nn.Module) -> None:
    """Raise an error if a criterion, a teacher or the distillation settings are not valid."""
    if given is not None and (not callable(given) or isinstance(given, type)):
        raise TypeError(
            f"criterion must be a function of (logits, targets), got {brief(given)}; a loss by name is the config's: "
            'FinetuneConfig(loss="focal")'
        )
    if isinstance(given, nn.Module) and any(True for _ in given.parameters()):
        raise RetrofitError(
            f"the criterion {type(given).__name__} has parameters, which would not be trained; make them buffers"
        )
    if teacher is not None:
        check_module(teacher, "teacher")
    if teacher is model:
        raise RetrofitError("the network can't be its own teacher; give a copy (copy.deepcopy)")
    try:
        part, temperature = distillation
        fits = 0 <= part <= 1 and 0 < temperature < math.inf
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise RetrofitError(
            "distillation must be the teacher's part in the loss, from 0 to 1, and a temperature above 0, got "
            f"{brief(distillation)}"
        )
