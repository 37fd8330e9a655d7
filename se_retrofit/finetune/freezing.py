"""What of a network is trained in which epoch; the rest is frozen, running statistics included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import RetrofitError
from .config import FinetuneConfig
from .parts import head_of, se_modules

__all__ = [
    "Stage",
    "Trained",
    "choose_trainable",
    "set_modes",
    "stages_of",
    "trained_ever",
    "trained_in",
    "trained_parts",
]

FEWEST_PARTS = 3  # a network whose children are fewer is looked into


@dataclass(frozen=True)
class Stage:
    """A part of the body that is unfrozen as a whole: the names of its parameters and buffers."""

    name: str
    tensors: frozenset[str]


@dataclass(frozen=True)
class Trained:
    """What is trained: the config's ``trainable``, and stages besides."""

    part: str
    stages: tuple[Stage, ...] = ()


def trained_in(config: FinetuneConfig, stages: tuple[Stage, ...], epoch: int) -> Trained:
    """What is trained in an epoch (from 0)."""
    if config.unfreeze_epoch is not None and epoch + 1 >= config.unfreeze_epoch:
        return Trained("all")
    return Trained(config.trainable, stages[: epoch // config.unfreeze_every] if config.unfreeze_every else ())


def trained_ever(config: FinetuneConfig, stages: tuple[Stage, ...]) -> Trained:
    """What would be trained sooner or later, if the run were to go on."""
    return Trained("all") if config.unfreeze_epoch is not None else Trained(config.trainable, stages)


def trained_parts(model: nn.Module, part: str) -> list[nn.Module]:
    """The modules that ``part`` names: ``"all"``, ``"se"`` or ``"se+head"``.

    Raises:
        RetrofitError: there is nothing of that kind in the network.
    """
    if part == "all":
        return [model]
    modules, heads = se_modules(model), head_of(model)
    if not modules:
        raise RetrofitError(
            f'trainable="{part}" needs SE modules, and this {type(model).__name__} has none; retrofit it first: '
            "model = add_se(model)"
        )
    if part == "se+head" and not heads:
        raise RetrofitError(f'trainable="se+head": no head found in {type(model).__name__}; take "se" or "all"')
    return modules if part == "se" else modules + heads


def choose_trainable(model: nn.Module, trained: Trained, given: dict[str, bool]) -> None:
    """Set ``requires_grad``: SE and the head are trained where ``trained`` names them, the rest as ``given`` where it is
    unfrozen."""
    chosen = {id(p) for part in trained_parts(model, trained.part) for p in part.parameters()}
    unfrozen = _tensors(trained.stages)
    for name, parameter in model.named_parameters():
        if trained.part == "all" or (name in unfrozen and id(parameter) not in chosen):
            parameter.requires_grad_(given.get(name, True))
        else:
            parameter.requires_grad_(id(parameter) in chosen)


def set_modes(model: nn.Module, trained: Trained, freeze_bn: bool) -> None:
    """Training mode, but for what is to stay as it is.

    What is frozen and keeps buffers (running statistics, power iterations) is in eval mode, so that they stay bit for
    bit; ``freeze_bn`` does it to the norms everywhere.
    """
    model.train()
    chosen = {id(m) for part in trained_parts(model, trained.part) for m in part.modules()}
    unfrozen = _tensors(trained.stages)
    for path, module in model.named_modules():
        buffers = {f"{path}.{name}" if path else name for name, _ in module.named_buffers(recurse=False)}
        frozen = bool(buffers) and id(module) not in chosen and not buffers <= unfrozen
        if frozen or (freeze_bn and keeps_statistics(module)):
            module.eval()


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it is a norm with running statistics, of torch's kind or by the names of its buffers."""
    own = dict(module.named_buffers(recurse=False))
    return isinstance(module, _NormBase) or any(name.startswith("running_") for name in own)


def _tensors(stages: Iterable[Stage]) -> set[str]:
    return {name for stage in stages for name in stage.tensors}


# Stages


def stages_of(model: nn.Module, config: FinetuneConfig) -> tuple[Stage, ...]:
    """The stages that ``unfreeze_every`` unfreezes, from the last to the first; none without it.

    They are timm's groups of layers (``group_matcher``); of other networks the children, in the order in which the
    network defines them.

    Raises:
        RetrofitError: all of the network is trained from the start.
    """
    if config.unfreeze_every is None:
        return ()
    chosen = {id(p) for part in trained_parts(model, config.trainable) for p in part.parameters()}
    heads = {id(p) for head in head_of(model) for p in head.parameters()}
    named = dict(model.named_parameters())
    body = [name for name, parameter in named.items() if id(parameter) not in chosen]
    stages: list[Stage] = []
    waiting: set[str] = set()
    for names in reversed(_groups(model, {name for name in body if id(named[name]) not in heads})):
        waiting |= names
        # What is left of the head's own group, and groups without parameters, go with the group before them
        of_head = any(name in named and id(named[name]) in heads & chosen for name in names)
        if not of_head and any(name in names for name in body):
            stages.append(Stage(_called(waiting, body), frozenset(waiting)))
            waiting = set()
    if any(name in waiting for name in body):
        stages.append(Stage(_called(waiting, body), frozenset(waiting)))
    if not stages:
        raise RetrofitError(
            f"unfreeze_every={config.unfreeze_every}: {type(model).__name__} has nothing but what "
            f'trainable="{config.trainable}" trains from the start; leave unfreeze_every out'
        )
    return tuple(stages)


def _groups(model: nn.Module, body: set[str]) -> list[set[str]]:
    """All parameters and buffers by name, in groups from the first to the last."""
    names = [name for tensors in (model.named_parameters(), model.named_buffers()) for name, _ in tensors]
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        # timm groups whatever has names; its parameters alone would leave norms without parameters out
        grouped: Any = SimpleNamespace(named_parameters=lambda: iter([(name, None) for name in names]))
        layer_of = group_parameters(grouped, matcher(coarse=True), reverse=True)
    else:
        parts = _paths(model, body)
        layer_of = {n: next((i for i, path in enumerate(parts) if n.startswith(f"{path}.")), 0) for n in names}
    return [{name for name in names if layer_of[name] == layer} for layer in sorted(set(layer_of.values()))]


def _paths(model: nn.Module, body: set[str]) -> list[str]:
    """The children, in order; the largest one's in its place, as long as there are only few of the body."""

    def weight(path: str) -> int:
        return sum(name.startswith(f"{path}.") for name in body)

    paths = [name for name, _ in model.named_children()]
    while 0 < sum(weight(path) > 0 for path in paths) < FEWEST_PARTS:
        largest = max(paths, key=weight)
        inner = [f"{largest}.{name}" for name, _ in model.get_submodule(largest).named_children()]
        if not any(weight(path) for path in inner):
            break
        at = paths.index(largest)
        paths[at : at + 1] = inner
    return paths


def _called(names: set[str], body: list[str]) -> str:
    """The modules that hold these parameters of the body and no others, as few as there can be."""
    within = Counter(path for name in body if name in names for path in _above(name))
    overall = Counter(path for name in body for path in _above(name))
    whole = [next((p for p in _above(name) if within[p] == overall[p]), name) for name in body if name in names]
    return ", ".join(dict.fromkeys(whole))


def _above(name: str) -> list[str]:
    """The paths of the modules that hold a parameter, from the outermost to its own."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]
