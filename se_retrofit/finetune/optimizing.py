"""What a network learns by: an optimizer and its schedule, which are timm's, a loss and the like; and the trial of both."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from ..errors import RetrofitError
from .checkpoint import join, load_optimizer, split
from .config import FinetuneConfig
from .criteria import Criterion
from .groups import groups_of

__all__ = ["Learning", "learning", "try_optimizer", "try_schedule"]


@dataclass
class Learning:
    """What a network learns by.

    Attributes:
        optimizer: of all parameters that are ever trained.
        schedule: timm's, None for a learning rate that stays.
        ema: the average of the weights; None for none.
        criterion: the loss.
        teacher: whose answers are learned, too; None for none.
        distillation: their part in the loss, and the temperature.
        mixup: timm's; None for none.
    """

    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: ModelEmaV3 | None
    criterion: Criterion
    teacher: nn.Module | None
    distillation: tuple[float, float]
    mixup: Mixup | None


def learning(
    model: nn.Module, config: FinetuneConfig, criterion: Criterion, teacher: nn.Module | None,
    distillation: tuple[float, float], batches: int, classes: int | None,
) -> Learning:  # fmt: skip
    """What a network learns by, on its device, with so many batches an epoch."""
    fused = next(model.parameters()).device.type == "cuda"
    made = optimizer(groups_of(model, config), config, fused)
    return Learning(
        made,
        schedule(made, config, math.ceil(batches / config.grad_accum_steps)),
        ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay is not None else None,
        criterion,
        teacher,
        distillation,
        mixup_of(config, classes),
    )


def mixup_of(config: FinetuneConfig, classes: int | None) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    if classes is None:
        raise RetrofitError("mixup and cutmix need the number of classes: num_classes=...")
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def try_schedule(config: FinetuneConfig) -> None:
    """Raise where the config's schedule can't be made, or fails at an update."""
    made = schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr), config, 1000)
    try:
        for part in range(11 if made is not None else 0):
            made.step_update(part * config.epochs * 100)
    except Exception as error:  # of what kind, each schedule decides
        raise RetrofitError(
            f"schedule {config.schedule!r} fails with {config.schedule_options}: {type(error).__name__}: {error}"
        ) from error


def try_optimizer(config: FinetuneConfig) -> None:
    """Make one update of two small parameters with the config's optimizer, write its state and load it again.

    Raises:
        RetrofitError: there is none of this name; it can't be made, needs a closure, or has a state that a checkpoint can't hold.
    """
    try:
        get_optimizer_class(config.optimizer, bind_defaults=False)
    except ValueError as error:
        raise RetrofitError(
            f"timm knows no optimizer {config.optimizer!r}; there are {', '.join(map(str, list_optimizers()))}"
        ) from error

    def small() -> torch.optim.Optimizer:
        with torch.random.fork_rng(devices=[]):
            parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
            return optimizer([{"params": parameters, "lr_scale": 1.0}], config, fused=False)

    first = small()
    for group in first.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.1)
    try:
        first.step()
    except Exception as error:  # each optimizer has its own words for it
        raise RetrofitError(
            f"optimizer {config.optimizer!r} can't make an update from gradients alone: {error}; take one that "
            "needs no closure and no second derivative, such as adamw"
        ) from error
    try:
        tree, tensors = split({"optimizer": first.state_dict()})
        again = join(json.loads(json.dumps(tree)), tensors)
        load_optimizer(small(), again["optimizer"])
    except Exception as error:  # neither does it matter here what can't be stored, but that it can't
        raise RetrofitError(
            f"the state of optimizer {config.optimizer!r} can't be written to a checkpoint and read again: {error}; "
            "take another optimizer, such as adamw"
        ) from error


def optimizer(groups: list[dict[str, Any]], config: FinetuneConfig, fused: bool) -> torch.optim.Optimizer:
    if not groups:
        raise RetrofitError("no parameter of the network requires a gradient; unfreeze what is to be trained")
    options = dict(config.optimizer_options)
    if (
        fused
        and "foreach" not in options
        and config.optimizer.lower() in ("adam", "adamw", "sgd", "nesterov", "momentum")
    ):
        options.setdefault("fused", True)
    try:
        return create_optimizer_v2(
            groups,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            **options,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise RetrofitError(f"optimizer {config.optimizer!r} can't be made with {options}: {error}") from error


def schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, updates_per_epoch: int) -> Any:
    warmup: Any = config.warmup_ratio * config.epochs  # timm says int, and takes fractions
    try:
        schedule, _ = create_scheduler_v2(
            optimizer, config.schedule, num_epochs=config.epochs, warmup_epochs=warmup,
            warmup_lr=config.lr / 100, step_on_epochs=False, updates_per_epoch=updates_per_epoch,
            **config.schedule_options,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError) as error:
        raise RetrofitError(
            f"schedule {config.schedule!r} can't be made with {config.schedule_options}: {error}"
        ) from error
    if (
        schedule is None and config.schedule != "none"
    ):  # what older versions of timm do with a name that they don't know
        raise RetrofitError(f"schedule {config.schedule!r} can't be made: timm's scheduler factory does not know it")
    if schedule is None:  # there is nobody to apply the scales of the groups
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return schedule
