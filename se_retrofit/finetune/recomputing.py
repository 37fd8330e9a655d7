"""Gradient checkpointing: activations that are computed once more in the backward pass, instead of being kept for it.

timm's networks do it themselves where they can. In others each block of the retrofit's plan does, by a class of its own for
the time of a training step (``form.py``); blocks that are lone layers of a sequence, as in VGG, are the beginnings of
sections of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import RetrofitError
from ..retrofit import has_se, plan_se
from ..surgery.splice.undo import is_retrofitted

__all__ = ["Kept", "recompute_activations"]

# By these a network is told to recompute: timm's, and DenseNet's in both libraries
SWITCHES = ("grad_checkpointing", "memory_efficient")
SECTIONS = "_sections_of_a_training_step"


def recompute_activations(model: nn.Module) -> None:
    """Have a network recompute its activations: attributes and classes of its modules change, and nothing else.

    Raises:
        RetrofitError: it can't itself, and has no blocks that could.
    """
    if recomputes(model) or by_itself(model):
        return
    blocks, sequences = units(model)
    classes = {cls: recomputed_block(cls) for cls in {type(block) for block in blocks}}
    for block in blocks:
        object.__setattr__(block, "__class__", classes[type(block)])
    for sequence, starts in sequences:
        setattr(sequence, SECTIONS, starts)
        object.__setattr__(sequence, "__class__", recomputed_sequence(type(sequence)))


def recomputes(model: nn.Module) -> bool:
    return any(getattr(module, switch, False) is True for module in model.modules() for switch in SWITCHES)


def by_itself(model: nn.Module) -> bool:
    """Switch on the network's own ``set_grad_checkpointing``; whether there is one that does something."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if callable(switch):
        with contextlib.suppress(AssertionError):  # how timm says that this network can't
            switch(True)
    return recomputes(model)


# Blocks of the plan


def units(model: nn.Module) -> tuple[list[nn.Module], list[tuple[nn.Sequential, tuple[int, ...]]]]:
    """The blocks that are recomputed, and the sequences, each with the places where a section of it begins."""
    try:
        paths = sorted(block_paths(model) - {""})
    except RetrofitError as error:
        raise RetrofitError(
            f"grad_checkpointing=True: no blocks were found in {type(model).__name__}: {error}"
        ) from error
    blocks: dict[str, nn.Module] = {}
    sequences: dict[str, set[int]] = {}
    for path in paths:
        block, above = model.get_submodule(path), path.rpartition(".")[0]
        if any(path.startswith(f"{outer}.") for outer in blocks):
            continue  # once is enough
        if any(True for _ in block.children()) and changeable(block):
            blocks[path] = block
        elif type(model.get_submodule(above)).forward is nn.Sequential.forward:
            number = [name for name, _ in model.get_submodule(above).named_children()].index(path.rpartition(".")[2])
            sequences.setdefault(above, set()).add(number)
    if not blocks and not sequences:
        raise RetrofitError(
            f"grad_checkpointing=True: {type(model).__name__} has no set_grad_checkpointing, and its blocks are no modules "
            "of their own whose activations could be recomputed; leave it out, or take a smaller batch_size with "
            "grad_accum_steps"
        )
    return list(blocks.values()), [(model.get_submodule(p), tuple(sorted(s))) for p, s in sequences.items()]  # type: ignore[misc]


def block_paths(model: nn.Module) -> set[str]:
    """The blocks of the plan by which the network was retrofitted, or would be."""
    if not has_se(model):
        return {site.block for site in plan_se(model).sites}
    ses = [(path, module.site) for path, module in model.named_modules() if is_retrofitted(module)]
    # The network may have become a part of another since it was retrofitted
    return {path.removesuffix(site.path) + site.block for path, site in ses}


def changeable(block: nn.Module) -> bool:
    return "forward" not in vars(block) and not isinstance(block, torch.jit.ScriptModule)


def recomputed_block(cls: type[nn.Module]) -> type[nn.Module]:
    """The class with a forward that is run once more in the backward pass."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(partial(cls.forward, self), type(self).__name__, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def recomputed_sequence(cls: type[nn.Module]) -> type[nn.Module]:
    """The same for a sequence, section by section."""

    def forward(self: nn.Module, value: Any) -> Any:
        modules, starts = list(self.children()), getattr(self, SECTIONS)
        value = in_turn(modules[: starts[0]], value)
        for start, end in zip(starts, (*starts[1:], len(modules)), strict=True):
            value = run(partial(in_turn, modules[start:end]), f"{type(self).__name__}[{start}:{end}]", value)
        return value

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def in_turn(modules: list[nn.Module], value: Any) -> Any:
    for module in modules:
        value = module(value)
    return value


def run(forward: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """``forward``, and once more in the backward pass, with the same random numbers, on inputs that must not change."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    versions = [value._version for value in inputs]
    output = checkpoint(forward, *args, use_reentrant=False, **kwargs)
    if [value._version for value in inputs] != versions:
        raise RetrofitError(
            f"grad_checkpointing=True: {name} changes its input in place, so that it can't be computed once more; build the "
            "network with inplace=False there, or leave grad_checkpointing out"
        )
    return output


# What a forward changes


class Kept:
    """The buffers of a network (running statistics, power iterations) through a backward pass that computes parts of it
    once more: these begin with what the first forward began with, and what they change does not count.

    Args:
        model: the network.
        wanted: whether parts are computed once more, as far as is known; a network may have been told so before.
    """

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        self.buffers: list[Tensor] = []
        if wanted or recomputes(model):
            self.buffers = [b for b in model.buffers() if b.numel()]
        self.before: list[Tensor] = []

    def note(self) -> None:
        """Call it before the forward pass."""
        self.before = [buffer.clone() for buffer in self.buffers]

    @contextlib.contextmanager
    def through_backward(self) -> Iterator[None]:
        """The buffers are as noted in the body, and after it as before it."""
        if not self.buffers:
            yield
            return
        after = [buffer.clone() for buffer in self.buffers]
        self._set(self.before)
        try:
            yield
        finally:
            self._set(after)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        # By .data, since a norm that is not computed once more has saved its statistics for the backward pass
        torch._foreach_copy_([buffer.data for buffer in self.buffers], values)
