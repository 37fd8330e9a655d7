"""Squeeze-and-Excitation itself: pool a feature map, compute a gate per channel, scale the channels with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from .errors import RetrofitError

__all__ = ["GATES", "SEAttention", "hidden_width"]

GATES = ("identity", "sigmoid")


def hidden_width(channels: int, reduction: int, min_hidden: int) -> int:
    """Width of the bottleneck between the two layers of the excitation: ``max(channels // reduction, min_hidden)``."""
    return max(channels // reduction, min_hidden)


class TwiceSigmoid(nn.Module):
    """``2 * sigmoid(z)``: exactly 1.0 at ``z = 0`` in every float format, range (0, 2)."""

    def forward(self, z: Tensor) -> Tensor:
        return 2.0 * torch.sigmoid(z)


# The two functions below are leaves to torch.fx: which dims they touch depends on the number of dims of their input,
# which a symbolic trace does not know.


def squeeze(x: Tensor, channel_dim: int) -> Tensor:
    """Mean over all spatial dims: ``(N, C, *spatial) -> (N, C)``, wherever ``channel_dim`` says that C is."""
    channel = channel_dim % x.dim()
    if channel == x.dim() - 1:
        return x.flatten(1, -2).mean(1) if channel > 1 else x
    if channel_dim < -1 or channel == 1:
        return x.flatten(channel + 1).mean(-1)  # a view in both memory formats, and quicker to reduce than several dims
    spatial: list[int] = []
    for dim in range(1, x.dim()):
        if dim != channel:
            spatial.append(dim)
    return x.mean(spatial)


def scale(x: Tensor, gate: Tensor, channel_dim: int, inplace: bool = False) -> Tensor:
    """Multiply each channel of ``x`` by its gate, broadcast over the spatial dims; where ``inplace`` and no gradient is
    needed, in ``x`` itself."""
    channel = channel_dim % x.dim()
    first = channel + 1 if channel_dim < -1 else 1
    for dim in range(first, x.dim()):
        if dim != channel:
            gate = gate.unsqueeze(dim)
    gate = gate.to(x.dtype)
    if inplace and not (torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)):
        return x.mul_(gate)
    return x * gate


torch.fx.wrap("squeeze")
torch.fx.wrap("scale")


class SEAttention(nn.Module):
    """Squeeze-and-Excitation (Hu et al., arXiv:1709.01507, section 3).

    Squeeze: global average pooling over the spatial dims. Excitation: ``Linear(C -> hidden)``, ReLU,
    ``Linear(hidden -> C)``, gate. Scale: the channel-wise product of input and gate.

    Args:
        channel: number of channels C of the feature maps.
        reduction: the bottleneck between the two layers is ``channel // reduction`` wide.
        gate: ``"sigmoid"``, the paper's, range (0, 1), which halves its input at z = 0; or ``"identity"``,
            ``2 * sigmoid`` with the last layer at zero, range (0, 2), which starts as an exact identity.
        bias: whether the two linear layers have biases.
        min_hidden: lower bound of the bottleneck's width.
        channel_dim: which dim of the input holds the channels: 1 for ``(N, C, *spatial)``, -1 for
            ``(N, *spatial, C)``. Below -1 it counts from the end, and all dims behind it are spatial: -3 takes
            ``(N, C, H, W)`` and ``(C, H, W)`` alike.
        inplace: where no gradient is needed, scale the input itself instead of a copy, which is several times faster on
            a CPU. For an input that nothing else uses.
        device, dtype: of the parameters, as in every torch module.

    Shape:
        ``(N, C, *spatial)`` or ``(N, *spatial, C)`` with any number of spatial dims, to the same shape.

    Raises:
        RetrofitError: an option is out of range.
        TypeError: an option is of the wrong type.

    Example:
        >>> import torch
        >>> from se_retrofit import SEAttention
        >>> se = SEAttention(channel=64, reduction=8)
        >>> se(torch.randn(1, 64, 32, 32)).shape
        torch.Size([1, 64, 32, 32])
        >>> list(se.state_dict())
        ['fc.0.weight', 'fc.2.weight']
    """

    def __init__(
        self,
        channel: int = 32,
        reduction: int = 8,
        *,
        gate: str = "sigmoid",
        bias: bool = False,
        min_hidden: int = 1,
        channel_dim: int = 1,
        inplace: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(reduction, gate, bias, min_hidden)
        check_positive("channel", channel)
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim must be an int, got {channel_dim!r}")
        if channel_dim == 0:
            raise RetrofitError("channel_dim=0 is the batch; give 1 for (N, C, *spatial) or -1 for (N, *spatial, C)")
        self.channel = channel
        self.reduction = reduction
        self.gate = gate
        self.channel_dim = channel_dim
        self.inplace = inplace
        self.hidden = hidden_width(channel, reduction, min_hidden)
        self.fc = nn.Sequential(
            nn.Linear(channel, self.hidden, bias=bias, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Linear(self.hidden, channel, bias=bias, device=device, dtype=dtype),
            nn.Sigmoid() if gate == "sigmoid" else TwiceSigmoid(),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights anew.

        Sigmoid gate: normal with a standard deviation of 0.001. Identity gate: Kaiming for the first layer, zero for
        the last, so that every gate is 1.0 while the last layer's gradient is not zero (as in LoRA).
        """
        first, last = self.fc[0], self.fc[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        if self.gate == "sigmoid":
            init.normal_(first.weight, std=0.001)
            init.normal_(last.weight, std=0.001)
        else:
            init.kaiming_normal_(first.weight, nonlinearity="relu")
            # Behind a norm the squeezed values hardly vary between inputs, so a narrow bottleneck could be dead for all
            # of them. Units in pairs of opposite sign: of each pair, one is alive for any input.
            with torch.no_grad():
                pairs = self.hidden // 2
                first.weight[pairs : 2 * pairs] = -first.weight[:pairs]
            init.zeros_(last.weight)
        for layer in (first, last):
            if layer.bias is not None:
                init.zeros_(layer.bias)

    reset_parameters = init_weights  # the name by which FSDP fills modules that were built on the meta device

    def excite(self, x: Tensor) -> Tensor:
        """The gates of an input, ``(N, C)``."""
        return self.fc(squeeze(x, self.channel_dim))

    def forward(self, x: Tensor) -> Tensor:
        # a trace by torch.jit holds for both grad modes
        return scale(x, self.excite(x), self.channel_dim, self.inplace and not torch.jit.is_tracing())

    def extra_repr(self) -> str:
        dim = "" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}"
        return f"{self.channel}, hidden={self.hidden}, gate={self.gate}{dim}"


def check_positive(name: str, value: int) -> None:
    """Raise unless ``value`` is an int of at least 1 (True is none)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise RetrofitError(f"{name} must be at least 1, got {value}")


def check_options(reduction: int, gate: str, bias: bool, min_hidden: int) -> None:
    """Raise unless these are options that an SE module can be built with."""
    check_positive("reduction", reduction)
    check_positive("min_hidden", min_hidden)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {bias!r}")
    if not isinstance(gate, str):
        raise TypeError(f"gate must be a string, got {gate!r}")
    if gate not in GATES:
        raise RetrofitError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")
