"""The arms: what is done to one trained base, and what of it is trained from then on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from se_retrofit import add_se, plan_se
from se_retrofit.attention import Inserted

REDUCTION = 4  # the networks are narrow
SE_FACTOR = 5.0  # how much faster SE learns than the network around it


@dataclass(frozen=True)
class Arm:
    """One way to go on from the base.

    Attributes:
        build: makes the network of the arm from a copy of the base, on an input of the given shape.
        trains: which modules are trained: ``"all"``, ``"se"``, ``"norms"`` or ``"head"``; the head always is.
        keeps_statistics: whether norms that are trained keep their running statistics; those that are frozen always do.
    """

    name: str
    build: Callable[[nn.Module, torch.Tensor], nn.Module]
    trains: str = "all"
    keeps_statistics: bool = False

    def prepare(self, base: nn.Module, example: torch.Tensor, seed: int) -> nn.Module:
        """The network of the arm; the base is left as it is."""
        torch.manual_seed(seed)
        model = self.build(copy.deepcopy(base), example).train()
        trained = {id(p) for p in self._trained(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return model

    def set_modes(self, model: nn.Module) -> None:
        """Train mode, but for norms whose statistics stay as they are."""
        model.train()
        if self.keeps_statistics or self.trains in ("se", "head"):
            for module in model.modules():
                if is_norm(module):
                    module.eval()

    def _trained(self, model: nn.Module) -> Iterable[nn.Parameter]:
        if self.trains == "all":
            return model.parameters()
        chosen: Callable[[nn.Module], bool]
        chosen = {"se": lambda m: isinstance(m, Inserted), "norms": is_norm, "head": lambda m: False}[self.trains]
        modules = [head_of(model), *filter(chosen, model.modules())]
        return [p for module in modules for p in module.parameters()]


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm))


def head_of(model: nn.Module) -> nn.Module:
    """The last linear layer outside of SE."""
    inside = {m for se in model.modules() if isinstance(se, Inserted) for m in se.modules()}
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside][-1]


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """For the optimizer: SE and static factors with a learning rate of their own, and without weight decay for factors."""
    se = {p for m in model.modules() if isinstance(m, Inserted) for p in m.parameters() if p.requires_grad}
    rest = [p for p in model.parameters() if p.requires_grad and p not in se]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr}]
    if se:
        groups.append({"params": [p for p in model.parameters() if p in se], "lr": SE_FACTOR * lr, "weight_decay": 0.0})
    return groups


def with_se(**options: Any) -> Callable[[nn.Module, torch.Tensor], nn.Module]:
    options = {"reduction": REDUCTION, **options}
    return lambda base, example: add_se(base, example_inputs=example, inplace=True, **options)


def with_late_se(base: nn.Module, example: torch.Tensor) -> nn.Module:
    """SE in the second half of the blocks only."""
    blocks = list(dict.fromkeys(site.block for site in plan_se(base, example_inputs=example).sites))
    return with_se(include=blocks[len(blocks) // 2 :])(base, example)


def unchanged(base: nn.Module, example: torch.Tensor) -> nn.Module:
    return base


ARMS = {
    arm.name: arm
    for arm in (
        Arm("plain", unchanged),
        Arm("SE", with_se()),
        Arm("SE, gate of 0.5", with_se(gate="sigmoid")),
        Arm("static factors", with_se(attention="static")),
        Arm("SE, late blocks", with_late_se),
        Arm("SE only", with_se(), "se"),
        Arm("static factors only", with_se(attention="static"), "se"),
        Arm("norms only", unchanged, "norms"),
        Arm("head only", unchanged, "head"),
    )
}
