"""Norms as a factor and a summand for each channel (of each image), computed from the means and variances of the
images' channels; and a check whether a module is such a norm."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..surgery.record.roles import is_sequential

# The kinds of norms that map each channel affinely, by their forward.
_KINDS: dict[Any, str] = {
    _BatchNorm.forward: "batch",
    timm.layers.BatchNormAct2d.forward: "batch",
    torchvision.ops.FrozenBatchNorm2d.forward: "frozen",
    timm.layers.FrozenBatchNormAct2d.forward: "frozen",
    nn.GroupNorm.forward: "group",
    timm.layers.GroupNorm.forward: "group",
    timm.layers.GroupNorm1.forward: "group",
    timm.layers.GroupNormAct.forward: "group",
}


def parts(module: Any) -> tuple[list[nn.Module], Any]:
    """Return the modules that a module runs one after the other, and the last of them, which may be a norm."""
    before: list[nn.Module] = []
    while isinstance(module, nn.Module) and "forward" not in vars(module) and not _hooked(module):
        if is_sequential(module) and len(module._modules):
            *inner, last = module.children()
            before += inner
        elif type(module).forward is timm.layers.ConvNormAct.forward and module.aa is None:
            before.append(module.conv)
            last = module.bn
        else:
            break
        module = last
    return before, module


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(registered) > 0 for registered in hooks)


def why_no_norm(module: Any) -> str | None:
    """Return why SE after a module can't be fused with the norm that the module ends in; None if it can."""
    norm = parts(module)[1]
    if not isinstance(norm, nn.Module):
        return "the value that SE scales is not the output of a module"
    name = type(norm).__name__
    if _hooked(norm):
        return f"{name} has hooks, which expect to see its output"
    if "forward" in vars(norm):
        return f"{name} has a forward of its own"
    if type(norm).forward not in _KINDS:
        if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
            return f"{name} has statistics of each position over the channels, which sums over positions don't give"
        return f"{name} is not a norm that is known to be an affine map of each channel"
    for inner in (getattr(norm, "drop", None), getattr(norm, "act", None)):
        if inner is not None and type(inner) is not nn.Identity:
            return f"{name} ends in {type(inner).__name__}: its output's mean does not follow from its input's"
    if getattr(norm, "_fast_norm", False):
        return f"{name} computes its statistics in half precision"
    if hasattr(norm, "parametrizations"):
        return f"{name} has parametrizations"
    return None


def affine_map(norm: Any, means: Tensor, variances: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Return the factor and the summand of each channel, ``(C,)``, or ``(N, C)`` for a group norm, from the means and
    variances over ``size`` positions, ``(N, C)``, without Bessel's correction; None if the norm has to raise its own
    error. The running statistics are updated as in the norm's own forward."""
    kind = _KINDS[type(norm).forward]
    if kind == "group":
        return _group(norm, means, variances)
    if kind == "frozen" or not (norm.training or norm.running_mean is None or norm.running_var is None):
        return _affine(norm, norm.running_mean, norm.running_var)
    count = means.shape[0] * size
    if count == 1:
        return None
    return _batch(norm, means.mean(0), variances.mean(0) + means.var(0, correction=0), count)


def _affine(norm: Any, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.rsqrt(variance + norm.eps)
    a = a if norm.weight is None else a * norm.weight
    b = -mean * a
    return a, b if norm.bias is None else b + norm.bias


def _batch(norm: Any, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            factor: Any = 0.0 if norm.momentum is None else norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if norm.momentum is None:
                    factor = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            if norm.running_mean is not None and norm.running_var is not None:
                unbiased = variance.detach() * (count / (count - 1))
                for running, new in ((norm.running_mean, mean.detach()), (norm.running_var, unbiased)):
                    running.copy_(running * (1 - factor) + new * factor)
    return _affine(norm, mean, variance)


def _group(norm: nn.GroupNorm, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    images, channels = means.shape
    m, v = (t.view(images, norm.num_groups, -1) for t in (means, variances))
    mean = m.mean(-1, keepdim=True).expand_as(m).reshape(images, channels)
    variance = v.mean(-1, keepdim=True) + m.var(-1, correction=0, keepdim=True)
    return _affine(norm, mean, variance.expand_as(m).reshape(images, channels))
