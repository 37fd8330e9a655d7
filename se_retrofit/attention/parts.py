"""What the attentions share: pooling, scaling, the gate ``2 * sigmoid``, and the initialisation of the bottleneck.

torch.fx treats the functions as leaves: which dims they use depends on the number of dims of their input, which a
symbolic trace does not know. ``channel_dim`` is the dim of C: 1 for ``(N, C, *spatial)``, -1 for ``(N, *spatial, C)``;
below -1, it is counted from the end, and all dims after it are spatial.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, check_positive


class TwiceSigmoid(nn.Module):
    """``2 * sigmoid(z)``, which is exactly 1.0 at ``z = 0`` in every float format, and has the range (0, 2)."""

    def forward(self, z: Tensor) -> Tensor:
        return 2.0 * torch.sigmoid(z)


def squeeze(x: Tensor, channel_dim: int, largest: bool = False) -> Tensor:
    """Return the mean (or the maximum) over all spatial dims: ``(N, C, *spatial) -> (N, C)``, wherever C is."""
    if x.is_quantized:
        x = x.dequantize()
    channel = channel_dim % x.dim()
    if channel == x.dim() - 1:
        if channel < 2:
            return x
        values, dim = x.flatten(1, -2), 1
    elif channel_dim < -1 or channel == 1:
        # a view in both memory formats, and faster to reduce than several dims
        values, dim = x.flatten(channel + 1), -1
    else:
        values, dim = x.movedim(channel, 1).flatten(2), -1
    return values.amax(dim) if largest else values.mean(dim)


def broadcast(gate: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Reshape gates ``(N, C)`` or ``(C,)`` so that they broadcast over ``x``, and convert them to its dtype."""
    channel = channel_dim % x.dim()
    for _ in range(x.dim() - 1 - channel):
        gate = gate.unsqueeze(-1)
    if channel == x.dim() - 1 and gate.dim() == 2:
        for _ in range(channel - 1):
            gate = gate.unsqueeze(1)
    return gate.to(x.dtype)


def scale(x: Tensor, gate: Tensor, channel_dim: int, inplace: bool = False) -> Tensor:
    """Multiply each channel of ``x`` by its gate, ``(N, C)`` or ``(C,)``; with ``inplace``, in ``x`` itself if no
    gradient is needed."""
    if x.is_quantized:  # by torch.ao's eager mode; gates above 1 need a range of their own
        values = x.dequantize()
        values = values * broadcast(gate, values, channel_dim)
        return torch.quantize_per_tensor_dynamic(values, x.dtype, True)
    gate = broadcast(gate, x, channel_dim)
    if inplace and not (torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)):
        return x.mul_(gate)
    return x * gate


def hidden_width(channels: int, reduction: int, min_hidden: int) -> int:
    """Return the width of the bottleneck of the excitation: ``max(channels // reduction, min_hidden)``."""
    check_positive("reduction", reduction)
    check_positive("min_hidden", min_hidden)
    return max(channels // reduction, min_hidden)


def undrawn(layer: Any, *sizes: int, **options: Any) -> Any:
    """Build a layer without initialising its parameters, because drawing values that are then redrawn is slow."""
    made = layer.__new__(layer)
    vars(made)["reset_parameters"] = lambda: None
    made.__init__(*sizes, **options)
    del vars(made)["reset_parameters"]
    return made


def bottleneck(channels: int, hidden: int, bias: bool, **factory: Any) -> list[nn.Module]:
    """Return the layers of the excitation before its gate, whose values ``init_bottleneck`` draws."""
    first = undrawn(nn.Linear, channels, hidden, bias=bias, **factory)
    return [first, nn.ReLU(inplace=True), undrawn(nn.Linear, hidden, channels, bias=bias, **factory)]


@torch.no_grad()
def init_bottleneck(first: Any, last: Any) -> None:
    """Initialise two linear layers: the first by Kaiming's method, the last with zeros, so that all gates are 1.0 while
    the gradient of the last layer is not zero (as in LoRA)."""
    # After a norm, the squeezed values hardly vary between inputs, so a narrow bottleneck could be dead for all of
    # them. Units come in pairs of opposite sign: one of each pair is alive for any input.
    pairs = first.out_features // 2
    drawn = first.weight[pairs:].normal_(0, math.sqrt(2 / first.in_features))
    torch.neg(drawn[:pairs], out=first.weight[:pairs])
    for zeros in (last.weight, first.bias, last.bias):
        if zeros is not None:
            zeros.zero_()


def check_kernel(size: int) -> None:
    """Raise an error unless ``size`` is a positive odd int."""
    check_positive("kernel_size", size)
    if size % 2 == 0:
        raise RetrofitError(f"kernel_size must be odd, got {size}")
