"""How parameters are updated: groups with learning rates, and timm's optimizers, schedules, weight EMA and mixup."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import RetrofitError
from .checkpoint import join, load_optimizer, split
from .config import FinetuneConfig
from .parts import head_of, se_modules

FASTEST = 0.01  # the learning rate of an SE layer times its number of inputs, at most, unless lr is higher
HAVE_FUSED = ("adam", "adamw", "sgd", "nesterov", "momentum")


@dataclass
class Learning:
    """The objects that a network is trained with."""

    optimizer: torch.optim.Optimizer  # of all parameters that are trained in any epoch
    schedule: Any  # timm's; None for a constant learning rate
    ema: ModelEmaV3 | None  # the moving average of the weights
    mixup: Mixup | None  # timm's mixup and cutmix


def learning(model: nn.Module, config: FinetuneConfig, batches: int, classes: int | None) -> Learning:
    """Build what a network is trained with, on its device, for this number of batches per epoch."""
    if (config.mixup or config.cutmix) and classes is None:
        raise RetrofitError("mixup and cutmix need the number of classes: num_classes=...")
    groups = scaled_groups(
        model, config.lr, config.weight_decay, config.se_lr_scale, config.head_lr_scale, config.layer_decay
    )
    optimizer = make_optimizer(groups, config, fused=any(p.is_cuda for p in model.parameters()))
    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes or 0)
    return Learning(
        optimizer,
        make_schedule(optimizer, config, math.ceil(batches / config.grad_accum_steps)),
        ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay is not None else None,
        mixup if config.mixup or config.cutmix else None,
    )


def mixed(mixup: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mix images, and return them with soft labels. timm mixes pairs: the last image of an odd batch stays unmixed."""
    if images.dim() < 4 and mixup.cutmix_alpha:
        raise RetrofitError(
            f"cutmix cuts rectangles out of images of two dimensions or more, got inputs of shape {tuple(images.shape)}; "
            "set cutmix=0, mixup takes inputs of every shape"
        )
    pairs = len(targets) // 2 * 2
    parts = []
    if pairs:
        some = images[:pairs].clone()  # timm works in place
        # timm cuts the first two dimensions after the channels, but computes the area from the last two
        flat, labels = mixup(some.flatten(1, -3) if some.dim() > 4 else some, targets[:pairs])
        parts.append((flat.view_as(some), labels))
    if pairs < len(targets):
        labels = mixup_target(targets[pairs:].repeat(2), mixup.num_classes, 1.0, mixup.label_smoothing)[:1]
        parts.append((images[pairs:], labels))
    inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return inputs, labels


def param_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.05, se_lr_scale: float = 1.0, head_lr_scale: float = 5.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the parameter groups that ``finetune`` uses, each with its own learning rate, for your own optimizer.

    Args:
        model: the network; parameters that require a gradient are put into the groups.
        lr: learning rate of the body.
        weight_decay: weight decay of the weights; norms and biases get none.
        se_lr_scale: factor on the rate of SE modules, whose layers learn at 16 * lr / inputs, at most max(lr, 0.01) / inputs:
            gates move alike at every width (muP, Yang et al., arXiv:2203.03466), and at most as fast as norms' scales.
        head_lr_scale: factor on ``lr`` for the classifier; use 1 if it is not new.
        layer_decay: factor on ``lr`` for each layer further from the head.

    Raises:
        RetrofitError: If ``layer_decay`` is given and timm finds no layers in the network.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se
        >>> from se_retrofit.finetune import param_groups
        >>> model = add_se(timm.create_model("resnet18", num_classes=10))
        >>> groups = param_groups(model, lr=1e-3)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> [f"0.01 / {0.01 / group['lr']:.0f}" for group in groups if group["name"] == "se"]
        ['0.01 / 64', '0.01 / 10', '0.01 / 128', '0.01 / 16', '0.01 / 256', '0.01 / 32', '0.01 / 512']
    """
    groups = scaled_groups(model, lr, weight_decay, se_lr_scale, head_lr_scale, layer_decay)
    plain = ("params", "weight_decay", "name")
    return [{"lr": lr * group["lr_scale"], **{key: group[key] for key in plain}} for group in groups]


def scaled_groups(
    model: nn.Module, lr: float, weight_decay: float, se_lr_scale: float, head_lr_scale: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Group the parameters that require a gradient: SE (by fan-in), head and body, with and without weight decay, and by
    timm's layers. timm's schedulers read ``lr_scale``, which holds for ``lr`` at the schedule's peak."""
    se = {key: fan_in for module in se_modules(model) for key, fan_in in fans_in(module).items()}
    head = {id(p) for module in head_of(model) for p in module.parameters()}
    no_weight_decay = getattr(model, "no_weight_decay", None)
    exempt = set(no_weight_decay()) if callable(no_weight_decay) else set()
    layer_scales = {} if layer_decay is None else scales_by_layer(model, layer_decay)
    groups: dict[tuple[str, bool, int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "se" if id(parameter) in se else "head" if id(parameter) in head else "body"
        decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
        fan_in = se.get(id(parameter), 1)
        scale = {"se": se_lr_scale * se_pace(fan_in, lr), "head": head_lr_scale, "body": 1.0}[kind]
        scale *= layer_scales.get(id(parameter), 1.0)
        group = groups.setdefault(
            (kind, decays, fan_in, scale),
            {
                "params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale, "fan_in": fan_in, "name": kind
            },
        )  # fmt: skip
        group["params"].append(parameter)
    return list(groups.values())


def scales_by_layer(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """Return the factor on the learning rate of each parameter, by its id."""
    layers = param_groups_layer_decay(model, layer_decay=layer_decay)
    scales: dict[int, float] = {id(p): layer["lr_scale"] for layer in layers for p in layer["params"]}
    if len(set(scales.values())) == 1:
        raise RetrofitError(
            f"layer_decay={layer_decay}: timm finds no layers in {type(model).__name__}, which has neither a "
            "group_matcher nor a pretrained_cfg that names its classifier; leave layer_decay out"
        )
    return scales


def se_pace(fan_in: int, lr: float) -> float:
    """Return the factor on ``lr`` for a layer of an SE module: 16 / fan-in, and less at high rates, so that the layer
    learns at max(lr, 0.01) / fan-in at most; between 1 / fan-in and 1.

    Under Adam, the output of a layer moves by about the learning rate times its number of inputs, so gates behind wide
    layers would be far from 1 after a few updates (docs/finetuning.md; measured in docs/evidence.md).
    """
    return min(1.0, max(1.0, FASTEST / max(lr, FASTEST / 16)) / fan_in)


def fans_in(module: nn.Module) -> dict[int, int]:
    """Return the number of inputs of each parameter's layer (1 without a weight of two dims), by the parameter's id."""
    found = {}
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        fan_in = max((weight.numel() // max(len(weight), 1) for weight in own if weight.dim() > 1), default=1)
        found.update({id(parameter): max(fan_in, 1) for parameter in own})
    return found


def rates_in_words(groups: Iterable[Mapping[str, Any]], lr: float) -> str:
    """Return a line with the peak learning rates of SE, head and body."""
    scales: dict[str, set[float]] = {}
    for group in groups:
        scales.setdefault(group["name"], set()).add(group["lr_scale"])
    words = []
    for name, found in sorted(scales.items()):
        low, high = (f"{lr * scale:.2e}" for scale in (min(found), max(found)))
        by = ", by the fan-in of its layers" if name == "se" and low != high else ""
        words.append(f"{'SE' if name == 'se' else name} {low if low == high else f'{low} to {high}'}{by}")
    return f"learning rates at their peak: {'; '.join(words)}"


def make_optimizer(groups: list[dict[str, Any]], config: FinetuneConfig, fused: bool) -> torch.optim.Optimizer:
    if not groups:
        raise RetrofitError("no parameter of the network requires a gradient; unfreeze the ones to train")
    options = dict(config.optimizer_options)
    if fused and "foreach" not in options and config.optimizer.lower() in HAVE_FUSED:
        options.setdefault("fused", True)
    try:
        return create_optimizer_v2(
            groups, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, **options
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise RetrofitError(f"optimizer {config.optimizer!r} can't be made with {options}: {error}") from error


def length_of(config: FinetuneConfig, updates_per_epoch: int) -> tuple[int, int]:
    """Return how many epochs a run starts, and how many updates it makes."""
    updates = config.epochs * updates_per_epoch
    if config.max_updates is not None:
        updates = min(updates, config.max_updates)
    return math.ceil(updates / updates_per_epoch), updates


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, updates_per_epoch: int) -> Any:
    said = f"schedule {config.schedule!r} can't be made with {config.schedule_options}"
    epochs: Any = length_of(config, updates_per_epoch)[1] / updates_per_epoch  # timm takes fractions
    try:
        schedule, _ = create_scheduler_v2(
            optimizer, config.schedule, num_epochs=epochs, warmup_epochs=config.warmup_ratio * epochs,
            warmup_lr=config.lr / 100, step_on_epochs=False, updates_per_epoch=updates_per_epoch,
            **config.schedule_options,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError) as error:
        raise RetrofitError(f"{said}: {error}") from error
    if schedule is None and config.schedule != "none":  # older versions of timm return None for an unknown name
        raise RetrofitError(f"{said}: timm's scheduler factory does not know it")
    if schedule is None:  # no scheduler applies the groups' factors
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return schedule


def try_out(config: FinetuneConfig) -> None:
    """Try out the config's optimizer and schedule: an update, saving and loading its state, the schedule's steps."""
    try:
        get_optimizer_class(config.optimizer, bind_defaults=False)
    except ValueError as error:
        names = ", ".join(map(str, list_optimizers()))
        raise RetrofitError(f"timm knows no optimizer {config.optimizer!r}; there are {names}") from error
    first = _small(config)
    what = f"optimizer {config.optimizer!r} can't make an update from gradients alone"
    try:
        first.step()
        what = f"the state of optimizer {config.optimizer!r} can't be written to a checkpoint and read again"
        tree, tensors = split({"optimizer": first.state_dict()})
        load_optimizer(_small(config), join(json.loads(json.dumps(tree)), tensors)["optimizer"])
        what = f"schedule {config.schedule!r} fails with {config.schedule_options}"
        schedule = make_schedule(first, config, 1000)
        for part in range(11 if schedule is not None else 0):
            schedule.step_update(part * config.epochs * 100)
    except RetrofitError:
        raise
    except Exception as error:  # each raises errors of its own kind
        raise RetrofitError(
            f"{what}: {type(error).__name__}: {error}; choose another, such as adamw and cosine"
        ) from error


def _small(config: FinetuneConfig) -> torch.optim.Optimizer:
    with torch.random.fork_rng(devices=[]):
        parameters = [nn.Parameter(torch.ones(*shape, device="cpu")) for shape in ((3, 2), (3,))]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        return make_optimizer([{"params": parameters, "lr_scale": 1.0}], config, fused=False)
