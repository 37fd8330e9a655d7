"""How a network runs in training: with SE fused for ``torch.compile``, with activations that are computed twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..errors import RetrofitError
from ..fusion import fuse_se, plan_fusion, unfuse_se
from ..retrofit import has_se

__all__ = ["TrainingForm", "recomputing"]

SWITCH = "grad_checkpointing"  # the attribute by which timm's networks are told to


class TrainingForm:
    """A context for a training step, in which the modules that ``fuse_se`` changes are of their fused classes.

    Outside of it the network is the caller's own, so what is evaluated, averaged and saved needs no conversion.
    """

    def __init__(self, model: nn.Module, fused: bool) -> None:
        self.classes: list[tuple[nn.Module, type, type]] = []
        if fused and has_se(model) and plan_fusion(model).fused:
            own = [(module, type(module)) for module in model.modules()]
            fuse_se(model, inplace=True)
            self.classes = [(module, cls, type(module)) for module, cls in own if type(module) is not cls]
            unfuse_se(model, inplace=True)

    def __enter__(self) -> None:
        for module, _, fused in self.classes:
            object.__setattr__(module, "__class__", fused)

    def __exit__(self, *error: object) -> None:
        for module, own, _ in self.classes:
            object.__setattr__(module, "__class__", own)


@contextlib.contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """In the body the network computes its activations once more in the backward pass, by its own ``set_grad_checkpointing``.

    Raises:
        RetrofitError: it has none, or none that does something.
    """
    if not wanted or recomputes(model):
        yield
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if callable(switch):
        with contextlib.suppress(AssertionError):  # how timm says that this network can't
            switch(True)
    if not recomputes(model):
        raise RetrofitError(
            f"grad_checkpointing=True: {type(model).__name__} has no set_grad_checkpointing of timm's kind; leave it out, "
            "or take a smaller batch_size with grad_accum_steps"
        )
    try:
        yield
    finally:
        switch(False)  # type: ignore[misc]


def recomputes(model: nn.Module) -> bool:
    return any(getattr(module, SWITCH, False) is True for module in model.modules())
