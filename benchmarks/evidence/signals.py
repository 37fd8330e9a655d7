"""What SE could use at each site of a network that has none: the loss's gradients by its gates, and what it would see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_retrofit import SEAttention

from .tasks import Part


@dataclass(frozen=True, eq=False)
class Signals:
    """What was seen at one site, on ``n`` images and for ``C`` channels, in float64.

    Attributes:
        gradients: of each image's loss by its gates, at gates of 1, ``(n, C)``.
        squeezed: the mean of each channel over space, which is what SE's first layer is given, ``(n, C)``.
    """

    gradients: Tensor
    squeezed: Tensor


def collect(model: nn.Module, part: Part, images: int) -> dict[str, Signals]:
    """Run a network with SE forward and backward over some images; by the path of each SE module, what was seen there.

    Args:
        model: with SE that has not been trained, so that its gates are 1; it is put into eval mode.
        part: the images.
        images: how many of them.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    called: list[tuple[str, Tensor, Tensor]] = []

    def open_gates(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], gates: Tensor) -> Tensor:
            ones = torch.ones_like(gates, requires_grad=True)
            called.append((path, args[0].detach(), ones))
            return ones

        return hook

    ses = {path: module for path, module in model.eval().named_modules() if isinstance(module, SEAttention)}
    hooks = [se.fc.register_forward_hook(open_gates(path)) for path, se in ses.items()]
    try:
        for x, y in zip(part.images[:images].split(100), part.labels[:images].split(100), strict=True):
            called.clear()
            loss = F.cross_entropy(model(x), y, reduction="sum")
            gradients = torch.autograd.grad(loss, [gates for _, _, gates in called])
            for (path, squeezed, _), gradient in zip(called, gradients, strict=True):
                seen.setdefault(path, []).append((gradient.double(), squeezed.double()))
    finally:
        for hook in hooks:
            hook.remove()
    return {p: Signals(torch.cat([g for g, _ in v]), torch.cat([s for _, s in v])) for p, v in seen.items()}
