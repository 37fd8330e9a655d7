"""Squeeze-and-Excitation itself: pool a feature map, compute a gate per channel, scale the channels with it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

from .errors import RetrofitError, brief

__all__ = ["GATES", "SEAttention", "hidden_width", "parameter_count"]

GATES = ("identity", "sigmoid", "static")


def hidden_width(channels: int, reduction: int, min_hidden: int) -> int:
    """Width of the bottleneck between the two layers of the excitation: ``max(channels // reduction, min_hidden)``."""
    return max(channels // reduction, min_hidden)


def parameter_count(channels: int, hidden: int, gate: str, bias: bool) -> int:
    """How many parameters an SE module has."""
    if gate == "static":
        return channels
    return 2 * channels * hidden + (hidden + channels if bias else 0)


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
        gate: ``"sigmoid"``, the paper's, range (0, 1), which halves its input at z = 0; ``"identity"``,
            ``2 * sigmoid`` with the last layer at zero, range (0, 2), which starts as an exact identity; or ``"static"``, a
            learned factor for each channel that starts at exactly 1 and looks at no input (the scale of SSF, Lian et al.,
            arXiv:2210.08823): a control for what the squeeze and the excitation add. It has no other options.
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
            raise TypeError(f"channel_dim must be an int, got {brief(channel_dim)}")
        if channel_dim == 0:
            raise RetrofitError("channel_dim=0 is the batch; give 1 for (N, C, *spatial) or -1 for (N, *spatial, C)")
        self.channel = channel
        self.reduction = reduction
        self.gate = gate
        self.channel_dim = channel_dim
        self.inplace = inplace
        self.hidden = 0 if gate == "static" else hidden_width(channel, reduction, min_hidden)
        self.factor: nn.Parameter | None = None
        self.fc: nn.Module = nn.Identity()
        if gate == "static":
            self.factor = nn.Parameter(torch.empty(channel, device=device, dtype=dtype))
        else:
            self.fc = nn.Sequential(
                nn.Linear(channel, self.hidden, bias=bias, device=device, dtype=dtype),
                nn.ReLU(inplace=True),
                nn.Linear(self.hidden, channel, bias=bias, device=device, dtype=dtype),
                nn.Sigmoid() if gate == "sigmoid" else TwiceSigmoid(),
            )
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew.

        Sigmoid gate: normal with a standard deviation of 0.001. Identity gate: Kaiming for the first layer, zero for
        the last, so that every gate is 1.0 while the last layer's gradient is not zero (as in LoRA). Static: ones.

        Args:
            generator: of the CPU, whatever device the weights are on; None for torch's own.
        """
        if next(self.parameters()).is_meta:
            return  # no values to draw, and torch takes long to draw none
        if self.factor is not None:
            init.ones_(self.factor)
            return
        assert isinstance(self.fc, nn.Sequential)
        first, last = self.fc[0], self.fc[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        if self.gate == "sigmoid":
            _draw(first.weight, 0.001, generator)
            _draw(last.weight, 0.001, generator)
        else:
            # Behind a norm the squeezed values hardly vary between inputs, so a narrow bottleneck could be dead for all
            # of them. Units in pairs of opposite sign: of each pair, one is alive for any input.
            pairs = self.hidden // 2
            _draw(first.weight[pairs:], math.sqrt(2 / self.channel), generator)  # Kaiming's, for a ReLU
            with torch.no_grad():
                torch.neg(first.weight[pairs : 2 * pairs], out=first.weight[:pairs])
            init.zeros_(last.weight)
        for layer in (first, last):
            if layer.bias is not None:
                init.zeros_(layer.bias)

    reset_parameters = init_weights  # the name by which FSDP fills modules that were built on the meta device

    def excite(self, x: Tensor) -> Tensor:
        """The gates of an input, ``(N, C)``."""
        if self.factor is not None:
            return self.factor.expand(x.shape[0], -1)
        return self.fc(squeeze(x, self.channel_dim))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - a block of its own is not compiled by torch.jit.script
            if not torch.is_grad_enabled() and self._is_bare(x):
                return self._forward_without_grad(x)
        # a trace by torch.jit holds for both grad modes
        return scale(x, self.excite(x), self.channel_dim, self.inplace and not torch.jit.is_tracing())

    def _is_bare(self, x: Tensor) -> bool:
        """Whether an eager call would come to the same operations as ``_forward_without_grad``: nothing is traced, hooked, or
        put in the place of a layer."""
        fc = self.fc
        if type(x) is not Tensor or x.dim() != 4 or self.channel_dim not in (1, -3) or type(fc) is not nn.Sequential:
            return False
        if type(self).excite is not SEAttention.excite or "excite" in self.__dict__:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or nn.modules.module._has_any_global_hook():
            return False
        layers = tuple(fc._modules.values())
        if tuple(map(type, layers)) not in _LAYERS:
            return False
        for module in (fc, *layers):
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                return False
        return True

    def _forward_without_grad(self, x: Tensor) -> Tensor:
        """The same values, bit for bit, by fewer calls: at a batch of one these take as long as the arithmetic."""
        layers: Any = self.fc._modules.values()
        first, _, last, gate_layer = layers
        z = F.linear(x.flatten(2).mean(-1), first.weight, first.bias).relu_()
        z = F.linear(z, last.weight, last.bias).sigmoid_()
        if type(gate_layer) is TwiceSigmoid:
            z.mul_(2.0)
        gate = z.to(x.dtype).view(x.shape[0], -1, 1, 1)
        return x.mul_(gate) if self.inplace else x * gate

    def extra_repr(self) -> str:
        if self.gate == "static":
            return f"{self.channel}, gate=static"
        dim = "" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}"
        return f"{self.channel}, hidden={self.hidden}, gate={self.gate}{dim}"


_LAYERS = {(nn.Linear, nn.ReLU, nn.Linear, last) for last in (nn.Sigmoid, TwiceSigmoid)}


def _draw(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill a weight with normal values; with a generator of the CPU they are the same on every device."""
    if generator is None or weight.device.type in ("cpu", "meta"):
        init.normal_(weight, std=std, generator=None if weight.device.type == "meta" else generator)
        return
    drawn = torch.empty(weight.shape, dtype=weight.dtype)
    with torch.no_grad():
        weight.copy_(drawn.normal_(0.0, std, generator=generator))


def check_positive(name: str, value: int) -> None:
    """Raise unless ``value`` is an int of at least 1 (True is none)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a positive int, got {brief(value)} of type {type(value).__name__}")
    if value < 1:
        raise RetrofitError(f"{name} must be at least 1, got {value}")


def check_options(reduction: int, gate: str, bias: bool, min_hidden: int) -> None:
    """Raise unless these are options that an SE module can be built with."""
    check_positive("reduction", reduction)
    check_positive("min_hidden", min_hidden)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False, got {brief(bias)}")
    if not isinstance(gate, str):
        raise TypeError(f"gate must be a string, got {brief(gate)}")
    if gate not in GATES:
        raise RetrofitError(f"gate must be one of {', '.join(map(repr, GATES))}, got {brief(gate)}")
