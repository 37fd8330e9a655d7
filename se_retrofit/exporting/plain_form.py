"""SE with a plain sigmoid, written as the patterns of quantisers and compilers expect it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import SEAttention

__all__ = ["PlainSE", "use_plain_form"]


class PlainSE(nn.Module):
    """What an ``SEAttention`` with the gate ``"sigmoid"`` computes, without a change of shape on the way.

    The mean keeps its dims, and both layers have biases and work on maps of size one: 1x1 convolutions for
    ``(N, C, *spatial)``, ``Linear`` for ``(N, *spatial, C)``. NNCF, for one, leaves SE unquantised where it finds
    mean, layer, bias, ReLU, layer, bias, sigmoid and product in this order, and nothing else between them.
    """

    def __init__(self, se: SEAttention) -> None:
        super().__init__()
        self.spatial = -se.channel_dim - 1
        assert isinstance(se.fc, nn.Sequential)
        self.fc1, self.fc2 = (_layer(layer, self.spatial) for layer in (se.fc[0], se.fc[2]))

    def forward(self, x: Tensor) -> Tensor:
        first = x.dim() - self.spatial if self.spatial else 1
        dims = list(range(first, x.dim() if self.spatial else x.dim() - 1))
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(dims, keepdim=True)))))


def _layer(linear: nn.Module, spatial: int) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    sizes = (linear.in_features, linear.out_features)
    factory: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = kinds[spatial - 1](*sizes, 1, **factory) if spatial else nn.Linear(*sizes, **factory)
    with torch.no_grad():
        layer.weight.copy_(linear.weight.reshape(layer.weight.shape))
        assert layer.bias is not None
        # exporters leave out a bias that is zero, and the pattern is gone; this one is lost in rounding
        layer.bias.copy_(torch.zeros_like(layer.bias) if linear.bias is None else linear.bias)
        layer.bias[layer.bias == 0] = torch.finfo(layer.bias.dtype).tiny
    return layer


def use_plain_form(model: nn.Module) -> None:
    """Put ``PlainSE`` in the place of each SE module with the gate ``"sigmoid"``, in place.

    SE whose channels are counted from the front may see any number of spatial dims; it stays as it is.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SEAttention) and child.gate == "sigmoid" and -4 <= child.channel_dim < 0:
                module._modules[name] = PlainSE(child)
