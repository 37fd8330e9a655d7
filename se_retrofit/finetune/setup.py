"""What is made before the first step: the checks, the optimizer and its schedule, the state of a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from ..errors import RetrofitError
from ..retrofit import warn_of_lost_sites
from . import checkpoint as disk
from .config import FinetuneConfig
from .parts import trained_parts


def checked(model: Any, config: Any, output_dir: Any, resume: bool) -> Path | None:
    """The output folder, after the arguments were looked at; nothing has been changed yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}")
    warn_of_lost_sites(model)
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config must be a FinetuneConfig, got {config!r} of type {type(config).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise RetrofitError(
            f"finetune wraps and compiles the network itself; give the bare one, not a {type(model).__name__}"
        )
    if any(type(value).__name__ == "DTensor" for value in (*model.parameters(), *model.buffers())):
        raise RetrofitError(
            "the model's parameters are spread over processes (fully_shard); finetune needs the whole network in each "
            "process: give the model as it was before, and start it with torchrun for DistributedDataParallel"
        )
    try:
        get_optimizer_class(config.optimizer, bind_defaults=False)
    except ValueError as error:
        raise RetrofitError(
            f"timm knows no optimizer {config.optimizer!r}; there are {', '.join(map(str, list_optimizers()))}"
        ) from error
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule(probe, config, 1000)
    try_optimizer(config)
    trained_parts(model, config.train)
    if output_dir is None:
        if resume:
            raise RetrofitError("resume=True needs the output_dir of the run that is to go on")
        return None
    output = Path(output_dir)
    if disk.has_checkpoint(output) and not resume:
        raise RetrofitError(f"{output} holds a run already; go on with it (resume=True), or give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RetrofitError(f"{output} can't be made: {error.strerror or error}") from error
    disk.check_folders(output)
    return output


def try_optimizer(config: FinetuneConfig) -> None:
    """Make one update of two small parameters with the config's optimizer, write its state and load it again.

    Raises:
        RetrofitError: it can't be made, needs a closure, or has a state that a checkpoint can't hold.
    """

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
        tree, tensors = disk.split({"optimizer": first.state_dict()})
        again = disk.join(json.loads(json.dumps(tree)), tensors)
        disk.load_optimizer(small(), again["optimizer"])
    except Exception as error:  # neither does it matter here what can't be stored, but that it can't
        raise RetrofitError(
            f"the state of optimizer {config.optimizer!r} can't be written to a checkpoint and read again: {error}; "
            "take another optimizer, such as adamw"
        ) from error


def part(config: FinetuneConfig, epoch: int) -> str:
    """What is trained in an epoch (from 0)."""
    unfrozen = config.unfreeze_epoch is not None and epoch + 1 >= config.unfreeze_epoch
    return "all" if unfrozen else config.train


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
            momentum=config.momentum,
            **options,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise RetrofitError(f"optimizer {config.optimizer!r} can't be made with {options}: {error}") from error


def schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, updates_per_epoch: int) -> Any:
    warmup: Any = config.warmup * config.epochs  # timm says int, and takes fractions
    try:
        schedule, _ = create_scheduler_v2(
            optimizer, config.schedule, num_epochs=config.epochs, warmup_epochs=warmup,
            warmup_lr=config.lr / 100, min_lr=config.min_lr, step_on_epochs=False, updates_per_epoch=updates_per_epoch,
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


def body_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate without the scales of SE and head."""
    group = optimizer.param_groups[0]
    scale = group.get("lr_scale", 1.0)
    return float(group["lr"]) / scale if scale else 0.0


def classes(classes: int | None) -> int:
    if classes is None:
        raise RetrofitError("mixup and cutmix need the number of classes: num_classes=...")
    return classes


def load_parts(
    saved: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    accelerator: Accelerator,
) -> None:
    """Put the saved state dicts back in place. timm's schedules have none: they go by the number of updates."""
    disk.load_optimizer(optimizer, saved["optimizer"])
    if ema is not None:
        ema.module.load_state_dict(saved["ema"])
    if accelerator.scaler is not None and "scaler" in saved:
        accelerator.scaler.load_state_dict(saved["scaler"])
