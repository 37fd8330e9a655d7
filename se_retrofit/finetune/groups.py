"""The parameters in groups, each with its weight decay and its part of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from ..errors import RetrofitError
from .config import FinetuneConfig
from .parts import head_of, se_modules

__all__ = ["fan_in_scales", "group_summary", "groups_of", "learning_rates_in_words", "param_groups"]

FULL_RATE = 16  # inputs up to which a layer of an SE module learns at the full rate


def param_groups(
    model: nn.Module, weight_decay: float, se_lr_scale: float, head_lr_scale: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameters that require a gradient, in groups: SE, head and body, each with and without weight decay; SE by the fan-in of
    its layers, too (see ``fan_in_scales``).

    ``lr_scale`` is read by timm's schedulers. No decay for norms and biases (all with one dim), nor for what the
    network's own ``no_weight_decay`` names. With ``layer_decay`` (timm's layers, from the head down; SE is of its block's)
    each group is split by layer.
    """
    se = {key: scale for module in se_modules(model) for key, scale in fan_in_scales(module).items()}
    head = {id(p) for module in head_of(model) for p in module.parameters()}
    no_weight_decay = getattr(model, "no_weight_decay", None)
    exempt = set(no_weight_decay()) if callable(no_weight_decay) else set()
    layer_scales: dict[int, float] = {}
    if layer_decay is not None:
        layers = param_groups_layer_decay(model, layer_decay=layer_decay)
        layer_scales = {id(p): layer["lr_scale"] for layer in layers for p in layer["params"]}
        if len(set(layer_scales.values())) == 1:
            raise RetrofitError(
                f"layer_decay={layer_decay}: timm finds no layers in {type(model).__name__}, which has neither a "
                "group_matcher nor a pretrained_cfg that names its classifier; leave layer_decay out"
            )
    groups: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "se" if id(parameter) in se else "head" if id(parameter) in head else "body"
        decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
        scale = {"se": se_lr_scale * se.get(id(parameter), 1.0), "head": head_lr_scale, "body": 1.0}[kind]
        scale *= layer_scales.get(id(parameter), 1.0)
        group = groups.setdefault(
            (kind, decays, scale),
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale, "name": kind},
        )
        group["params"].append(parameter)
    return list(groups.values())


def groups_of(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """The groups of a run."""
    return param_groups(model, config.weight_decay, config.se_lr_scale, config.head_lr_scale, config.layer_decay)


def fan_in_scales(module: nn.Module) -> dict[int, float]:
    """What the learning rate of each parameter is multiplied by, ``min(1, 16 / fan_in)`` of its layer, by the parameter's id.

    Under Adam each weight moves by about the learning rate, whatever its gradient, so what a layer gives out moves by that times
    its number of inputs. In a pretrained network a gate behind a wide layer is saturated after a few updates, and
    has no gradient from then on. With rates in proportion to 1 / fan_in, the way in which hidden layers are scaled in muP (Yang et
    al., arXiv:2203.03466), gates move alike at every width. A bias has the rate of its layer; parameters of a layer
    without a weight of two dims or more (a static factor, a norm) have the full one.

    Example:
        >>> from torch import nn
        >>> from se_retrofit.finetune.groups import fan_in_scales
        >>> list(fan_in_scales(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))).values())
        [0.25, 0.25, 1.0, 1.0]
    """
    scales = {}
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        fan_in = max((weight.numel() // max(len(weight), 1) for weight in own if weight.dim() > 1), default=1)
        scales.update({id(parameter): min(1.0, FULL_RATE / max(fan_in, 1)) for parameter in own})
    return scales


def group_summary(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each group its name, its part of the learning rate, its weight decay and its number of tensors, as plain data."""
    return [
        {
            "name": group.get("name"),
            "lr_scale": group.get("lr_scale", 1.0),
            "weight_decay": group.get("weight_decay", 0.0),
            "tensors": len(group["params"]),
        }
        for group in groups
    ]


def learning_rates_in_words(groups: Iterable[Mapping[str, Any]], lr: float) -> str:
    """The highest learning rate of SE, head and body, as a line."""
    scales: dict[str, set[float]] = {}
    for group in groups:
        scales.setdefault(group["name"], set()).add(group["lr_scale"])
    words = []
    for name, found in sorted(scales.items()):
        low, high = (f"{lr * scale:.2e}" for scale in (min(found), max(found)))
        by = ", by the fan-in of its layers" if name == "se" and low != high else ""
        words.append(f"{'SE' if name == 'se' else name} {low if low == high else f'{low} to {high}'}{by}")
    return f"learning rates at their peak: {'; '.join(words)}"
