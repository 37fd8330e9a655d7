"""Squeeze-and-Excitation: pool a feature map, compute a gate for each channel, and scale the channels by the gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, check_choice, check_flag, check_positive
from .inserted import Inserted
from .parts import TwiceSigmoid, bottleneck, hidden_width, init_bottleneck

GATES = ("identity", "sigmoid")
WIDEST = 65_536  # a larger min_hidden is a slip, which would take gigabytes for each block


class SEAttention(Inserted):
    """Squeeze-and-Excitation (Hu et al., arXiv:1709.01507, section 3).

    Squeeze: global average pooling over the spatial dims. Excitation: ``Linear(C -> hidden)``, ReLU,
    ``Linear(hidden -> C)``, gate. Scale: the channel-wise product of the input and the gates.

    Args:
        channel: number of channels C of the feature maps.
        reduction: reduction ratio; the bottleneck between the two layers is ``channel // reduction`` wide.
        gate: ``"sigmoid"``, the paper's, with the range (0, 1), which halves its input at z = 0; or ``"identity"``,
            ``2 * sigmoid`` with the last layer at zero, with the range (0, 2), which starts as an exact identity.
        bias: whether the two linear layers have biases.
        min_hidden: minimum width of the bottleneck.
        channel_dim: the channel dim of the input: 1 for ``(N, C, *spatial)``, -1 for ``(N, *spatial, C)``. Below -1, it
            is counted from the end, and all dims after it are spatial: -3 accepts both ``(N, C, H, W)`` and
            ``(C, H, W)``.
        inplace: scale the input itself instead of a copy if no gradient is needed, which is several times faster on a
            CPU. The input must not be used elsewhere.
        device, dtype: device and dtype of the parameters, as for all torch modules.

    Shape:
        ``(N, C, *spatial)`` or ``(N, *spatial, C)`` with any number of spatial dims, to the same shape.

    Raises:
        RetrofitError: If an option is out of range.
        TypeError: If an option is of the wrong type.

    Example:
        >>> import torch
        >>> from se_retrofit import SEAttention
        >>> se = SEAttention(channel=64, reduction=8)
        >>> se(torch.randn(1, 64, 32, 32)).shape
        torch.Size([1, 64, 32, 32])
        >>> list(se.state_dict())
        ['fc.0.weight', 'fc.2.weight']
    """

    gate_layer = "fc"

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
        check_options(reduction, gate, bias, min_hidden)
        super().__init__(channel, channel_dim, inplace)
        self.reduction = reduction
        self.gate = gate
        vars(self)["hidden"] = hidden = hidden_width(channel, reduction, min_hidden)
        layers = bottleneck(channel, hidden, bias, device=device, dtype=dtype)
        self.fc: nn.Module = nn.Sequential(*layers, nn.Sigmoid() if gate == "sigmoid" else TwiceSigmoid())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw the weights. Sigmoid gate: normal with a standard deviation of 0.001. Identity gate: Kaiming for the
        first layer, zeros for the last, so that all gates are 1.0, but the last layer has a gradient (as in LoRA)."""
        fc: Any = self.fc
        if fc[0].weight.is_meta:
            return  # there are no values to draw, and torch would take long over it
        init_bottleneck(fc[0], fc[2])
        if self.gate == "sigmoid":
            fc[0].weight.normal_(0, 0.001)
            fc[2].weight.normal_(0, 0.001)

    __jit_unused_properties__ = ("channel", "hidden")

    # some may have been pruned since, or a layer be wrapped (by LoRA, say)
    @property
    def channel(self) -> int:
        """Number of channels."""
        fc: Any = self.fc
        return getattr(fc[0], "in_features", vars(self)["channel"])

    @property
    def hidden(self) -> int:
        """Width of the bottleneck."""
        fc: Any = self.fc
        return getattr(fc[0], "out_features", vars(self)["hidden"])

    @property
    def gate_range(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.gate == "sigmoid" else (0.0, 2.0)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates for an input, ``(N, C)``."""
        return self.fc(self.squeezed(x))

    def summary(self) -> str:
        return f"SE {self.channel} -> {self.hidden} -> {self.channel}"

    def extra_repr(self) -> str:
        dim = "" if self.channel_dim == 1 else f", channel_dim={self.channel_dim}"
        return f"{self.channel}, hidden={self.hidden}, gate={self.gate}{dim}"


def check_options(reduction: int, gate: str, bias: bool, min_hidden: int) -> None:
    """Raise an error unless an SE module can be built with these options."""
    check_positive("reduction", reduction)
    check_positive("min_hidden", min_hidden)
    if min_hidden > WIDEST:
        raise RetrofitError(f"min_hidden must be at most {WIDEST}, got {min_hidden}")
    check_flag("bias", bias)
    check_choice("gate", gate, GATES)
