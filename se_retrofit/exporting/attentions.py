"""The built-in attentions in plain PyTorch, for an exported file: the source of each class, and its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..attention import CBAM, ECA, SEAttention, StaticFactor
from ..attention.cbam import over_channels, scale_positions
from ..attention.parts import broadcast, scale, squeeze
from ..errors import RetrofitError
from ..tables import Name

_SE = '''class SqueezeExcitation(nn.Module):
    """Squeeze-and-Excitation (Hu et al., arXiv:1709.01507)."""

    def __init__(self, channels: int, hidden: int, gate: str, bias: bool, channel_dim: int) -> None:
        super().__init__()
        self.gate, self.channel_dim = gate, channel_dim
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, channels, bias=bias), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(squeeze(x, self.channel_dim))
        return scale(x, 2.0 * gate if self.gate == "identity" else gate, self.channel_dim)
'''

_ECA = '''class EfficientChannelAttention(nn.Module):
    """Efficient Channel Attention (Wang et al., arXiv:1910.03151)."""

    def __init__(self, kernel_size: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = squeeze(x, self.channel_dim)
        rows = z.unsqueeze(0).unsqueeze(-2).flatten(0, -3)
        return scale(x, 2.0 * torch.sigmoid(self.conv(rows).reshape(z.shape)), self.channel_dim)
'''

_CBAM = '''class ConvolutionalBlockAttention(nn.Module):
    """Convolutional Block Attention Module (Woo et al., arXiv:1807.06521)."""

    def __init__(self, channels: int, hidden: int, bias: bool, kernel_size: int, dims: int, channel_dim: int) -> None:
        super().__init__()
        self.dims, self.channel_dim = dims, channel_dim
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, channels, bias=bias)
        )
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = conv(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim
        gate = self.mlp(squeeze(x, dim)) + self.mlp(squeeze(x, dim, True))
        x = scale(x, 2.0 * torch.sigmoid(gate), dim)
        return scale_positions(x, 2.0 * torch.sigmoid(self.conv(over_channels(x, dim, self.dims))), dim)
'''

_STATIC = '''class StaticFactor(nn.Module):
    """A learned factor for each channel (SSF, Lian et al., arXiv:2210.08823)."""

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.factor = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return scale(x, self.factor, self.channel_dim)
'''

# the class for each attention in an exported file: its name, its source, and the functions that it calls
_CLASSES: dict[type, tuple[str, str, tuple[Any, ...]]] = {
    SEAttention: ("SqueezeExcitation", _SE, (squeeze, broadcast, scale)),
    ECA: ("EfficientChannelAttention", _ECA, (squeeze, broadcast, scale)),
    CBAM: ("ConvolutionalBlockAttention", _CBAM, (squeeze, broadcast, scale, over_channels, scale_positions)),
    StaticFactor: ("StaticFactor", _STATIC, (broadcast, scale)),
}


def arguments_of(path: str, module: Any) -> tuple[Any, ...]:
    """Return the class that represents an inserted module in the file, and the arguments of its constructor."""
    if type(module) not in _CLASSES:
        raise RetrofitError(
            f"{path} is {module.summary()}, whose source can't be exported; that of the built-in attentions can. Save the network with "
            "save_retrofitted, or export it to another format"
        )
    return Name(_CLASSES[type(module)][0]), *_sizes(module)


def _sizes(module: Any) -> tuple[Any, ...]:
    cls = type(module)
    if cls is SEAttention:
        return module.channel, module.hidden, module.gate, module.fc[0].bias is not None, module.channel_dim
    if cls is ECA:
        return module.conv.kernel_size[0], module.channel_dim
    if cls is CBAM:
        bias = module.mlp[0].bias is not None
        return module.channel, module.hidden, bias, module.conv.kernel_size[0], module.dims, module.channel_dim
    return module.channel, module.channel_dim


def classes_text(modules: Iterable[nn.Module]) -> str:
    """Return the source of the classes of inserted modules, and of the functions that they call."""
    rows = [_CLASSES[cls] for cls in dict.fromkeys(map(type, modules))]
    functions = dict.fromkeys(function for _, _, called in rows for function in called)
    return "\n\n".join([*map(inspect.getsource, functions), *(text for _, text, _ in rows)])
