"""The classes that modules have during a training step: norms over all processes, SE fused with the norm before it, and
blocks whose activations are recomputed.

A class is changed (and switches of the network's own for recomputing), and nothing else: parameters, buffers, hooks and
names stay the same objects. Outside of a step the network is the caller's own, so what is evaluated, averaged and saved
needs no conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import RetrofitError
from ..fusion import fuse_se, plan_fusion
from ..retrofit import has_se
from .config import FinetuneConfig
from .recomputing import recompute_activations

__all__ = ["TrainingForm", "check_sync", "training_form"]


class SyncNorm(nn.SyncBatchNorm):
    process_group = None  # all of them


class SyncNormAct(SyncBatchNormAct):
    process_group = None


# The norms that have a counterpart over all processes, by their forward
SYNCHRONIZED: dict[Any, type] = {_BatchNorm.forward: SyncNorm, BatchNormAct2d.forward: SyncNormAct}


@dataclass(frozen=True)
class Change:
    """A module, and its class and its plain attributes outside of a step and during it."""

    module: nn.Module
    own: type
    other: type
    attributes: dict[str, tuple[Any, Any]]


ABSENT = object()


class TrainingForm:
    """A context in which some modules are of other classes, and have other attributes."""

    def __init__(self, changes: list[Change]) -> None:
        self.changes = changes

    def __enter__(self) -> None:
        for change in self.changes:
            object.__setattr__(change.module, "__class__", change.other)
            _set(change.module, {name: during for name, (_, during) in change.attributes.items()})

    def __exit__(self, *error: object) -> None:
        for change in self.changes:
            object.__setattr__(change.module, "__class__", change.own)
            _set(change.module, {name: before for name, (before, _) in change.attributes.items()})


def _set(module: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is ABSENT:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value


def training_form(model: nn.Module, config: FinetuneConfig) -> TrainingForm:
    """The form in which ``config`` has a network trained; the network itself is left as it is.

    Raises:
        RetrofitError: its activations are to be recomputed, and it has no blocks for that.
    """
    own = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        if config.sync_batch_norm:
            for module, cls, _ in own:
                if isinstance(module, _BatchNorm) and cls.forward in SYNCHRONIZED:
                    object.__setattr__(module, "__class__", SYNCHRONIZED[cls.forward])
        if config.compile and has_se(model) and plan_fusion(model).fused:
            fuse_se(model, inplace=True)
        if config.grad_checkpointing:
            recompute_activations(model)
        changes = [Change(m, cls, type(m), _differing(before, vars(m))) for m, cls, before in own]
        return TrainingForm([c for c in changes if c.own is not c.other or c.attributes])
    finally:
        for module, cls, before in own:
            object.__setattr__(module, "__class__", cls)
            _set(module, {name: values[0] for name, values in _differing(before, vars(module)).items()})


def _differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [name for name in before | after if before.get(name, ABSENT) is not after.get(name, ABSENT)]
    return {name: (before.get(name, ABSENT), after.get(name, ABSENT)) for name in names}


def check_sync(model: nn.Module, config: FinetuneConfig, world: int, device: str) -> None:
    """Raise if ``sync_batch_norm`` is not available.

    Raises:
        RetrofitError: there is one process; the processes are on the CPU; the network has no batch norm; or it has one
            of a class that has no counterpart.
    """
    if not config.sync_batch_norm:
        return
    if world == 1:
        raise RetrofitError(
            "sync_batch_norm=True shares the norms' statistics between processes, and there is one process; start several "
            "with torchrun, or leave it out"
        )
    if device == "cpu":
        raise RetrofitError(
            "sync_batch_norm=True: PyTorch's SyncBatchNorm runs on accelerators alone, and these processes are on the "
            "CPU; leave it out, or take a larger batch_size or freeze_bn=True"
        )
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    others = [
        f"{path} ({type(module).__name__})"
        for path, module in norms.items()
        if type(module).forward not in SYNCHRONIZED and not isinstance(module, nn.SyncBatchNorm)
    ]
    if others or not norms:
        what = f"has batch norms of other classes: {', '.join(others[:3])}" if others else "has no batch norm"
        raise RetrofitError(f"sync_batch_norm=True: {type(model).__name__} {what}; leave it out")
