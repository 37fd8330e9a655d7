"""What of a network is trained in which epoch; the rest is frozen, running statistics included."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import RetrofitError
from .config import FinetuneConfig
from .parts import head_of, se_modules

__all__ = ["choose_trainable", "set_modes", "trained_ever", "trained_in", "trained_parts"]


def trained_in(config: FinetuneConfig, epoch: int) -> str:
    """The part that is trained in an epoch (from 0): ``"all"``, ``"se"`` or ``"se+head"``."""
    return "all" if config.unfreeze_epoch is not None and epoch + 1 >= config.unfreeze_epoch else config.trainable


def trained_ever(config: FinetuneConfig) -> str:
    """The part that would be trained sooner or later, if the run were to go on."""
    return config.trainable if config.unfreeze_epoch is None else "all"


def trained_parts(model: nn.Module, part: str) -> list[nn.Module]:
    """The modules that ``part`` names.

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


def choose_trainable(model: nn.Module, part: str, given: dict[str, bool]) -> None:
    """Set ``requires_grad``: of SE and the head where ``part`` names them; of the whole network as ``given``."""
    chosen = {id(p) for module in trained_parts(model, part) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(given.get(name, True) if part == "all" else id(parameter) in chosen)


def set_modes(model: nn.Module, part: str, freeze_bn: bool) -> None:
    """Training mode, but for what is to stay as it is.

    What is frozen and keeps buffers (running statistics, power iterations) is in eval mode, so that they stay bit for
    bit; ``freeze_bn`` does it to the norms everywhere.
    """
    model.train()
    chosen = {id(m) for module in trained_parts(model, part) for m in module.modules()}
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        statistics = isinstance(module, _NormBase) or any(name.startswith("running_") for name in own)
        if (own and id(module) not in chosen) or (freeze_bn and statistics):
            module.eval()
