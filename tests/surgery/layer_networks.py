"""Layers beside plain convolutions: deformable ones, attention, and activations of other kinds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from join_networks import joined
from structure import Unit, conv, structure, unit
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

IMAGE = torch.randn(2, 3, 16, 16)
WAVE = torch.randn(2, 8, 40)

# Other convolutions, and attention ------------------------------------------------------------------------------------


@joined("")
class Deformed(nn.Module):
    """Two deformable convolutions (Dai et al., arXiv:1703.06211)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.offset1, self.conv1 = conv(channels, 18), DeformConv2d(channels, channels, 3, padding=1)
        self.offset2, self.conv2 = conv(channels, 18), DeformConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x, self.offset1(x)))
        return x + self.conv2(y, self.offset2(y))


class WrittenOut(nn.Module):
    """A norm with fixed statistics, as FrozenBatchNorm2d and its like write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        for name in ("mean", "shift"):
            self.register_buffer(name, torch.linspace(-1, 1, 8).view(1, 8, 1, 1))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "scale, shift":
            return x * self.scale + self.shift
        return (x - self.mean) * self.scale if self.form == "shift, scale" else (x - self.mean) / self.scale


class FrozenUnit(nn.Module):
    form = "scale, shift"

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm2 = conv(8, 8), conv(8, 8), WrittenOut(self.form)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.conv1(x).relu()))


for number, form in enumerate(("scale, shift", "shift, scale", "shift, quotient")):
    joined("norm2")(type(f"FrozenNorm{number}", (FrozenUnit,), {"form": form}))


class Centred(nn.Module):
    """A convolution whose weight is computed in the forward (Qiao et al., arXiv:1903.10520), so that no layer has a path."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.conv1, self.conv2 = nn.Parameter(torch.randn(8, 8, 3, 3)), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        x = F.conv2d(x, weight, padding=1).relu()
        return x + self.conv2(self.conv1(x).relu())


@structure(IMAGE, sites={"blocks.0": 8, "blocks.1": 8}, after="conv2", skipped={"blocks.0": "plain chain"})
class WeightCentred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 8), nn.Sequential(Centred(), Centred())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Attention(nn.Module):
    """Self-attention with a convolution for its keys, or for its positions (Zhang et al., arXiv:1805.08318)."""

    def __init__(self, position: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.query, self.value = conv(8, 8, 1), conv(8, 8, 1)
        self.key = conv(8, 8, 3 if position is None else 1)
        self.position, self.act = position, act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        weights = torch.softmax(q.flatten(2).transpose(1, 2) @ k.flatten(2), -1)
        out = (v.flatten(2) @ weights.transpose(1, 2)).view_as(x)
        if self.position is not None:
            out = out + self.position(v)
        return x + self.act(out)


def depthwise(norm: bool) -> nn.Module:
    layer = conv(8, 8, groups=8)
    return nn.Sequential(layer, nn.BatchNorm2d(8)) if norm else layer


@structure(IMAGE, sites={"layers.0": 8, "layers.2": 8, "layers.4": 8, "layers.6": 8}, kind="chain")
class SAGAN(nn.Module):
    """A chain with attention in between: the odd branch gets no SE, and the chain gets its own."""

    def __init__(self) -> None:
        super().__init__()
        attentions = Attention(), Attention(depthwise(norm=False)), Attention(depthwise(norm=True))
        between = [m for attention in attentions for m in (attention, unit(8, 8))]
        self.layers = nn.Sequential(unit(3, 8), *between, conv(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@structure(IMAGE, sites={"1": 8})
class EfficientFormer(nn.Sequential):
    """Local features are added to the values and activated with them (Li et al., arXiv:2212.08059)."""

    def __init__(self) -> None:
        super().__init__(unit(3, 8), Attention(depthwise(norm=True), nn.GELU()), conv(8, 2))


class Bilinear(nn.Module):
    """Convolutions of rows and columns make the weights of attention, by a sigmoid and a norm of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = unit(8, 4, 1), unit(4, 8, 1)
        self.rows, self.columns = conv(4, 4, (5, 1)), conv(4, 4, (1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        p, q = self.rows(y).sigmoid(), self.columns(y).sigmoid()
        p, q = p / p.sum(3, keepdim=True), q / q.sum(2, keepdim=True)
        return x + self.last(p.matmul(y).matmul(q))


class Attended(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Bilinear()

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.attention(self.norm1(self.conv1(x)).relu())))).relu()


@structure(IMAGE, sites={"1": 8, "2": 8}, after="norm2")
class BAT(nn.Sequential):
    """Attention inside of residual units (Chi et al., arXiv:2006.03318): SE is the unit's, not the attention's."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8), Attended(), Attended())


@structure(IMAGE, sites={"unit": 8}, skipped={"extra.conv1": "train mode alone", "extra.conv2": "train mode alone"})
class OfTraining(nn.Module):
    """A unit that runs in train mode alone gets no SE, and is listed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.extra, self.fc = conv(3, 8), Unit(), Unit(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(self.stem(x))
        if self.training:
            x = self.extra(x)
        return self.fc(x.mean((2, 3)))


class Wave2Vec(nn.Module):
    """A convolutional feature extractor, and positions by a convolution (Baevski et al., arXiv:2006.11477)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(m for i in (1, 8, 8) for m in (nn.Conv1d(i, 8, 3, 2), nn.GroupNorm(8, 8), nn.GELU()))
        )
        self.position = conv(8, 8, 5, 1, groups=2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).transpose(1, 2)
        y = y + F.gelu(self.position(y.transpose(1, 2))).transpose(1, 2)
        return self.layer(y)


structure(torch.randn(2, 1, 64), sites={"features.2": 8, "features.5": 8, "features": 8}, kind="chain")(Wave2Vec)


@structure(torch.randn(1, 3, 16), sites={"units.0": 8, "units.1": 8})
class TimeFirst(nn.Module):
    """A recurrent layer with time before a batch of one: nothing is pooled (EnCodec, Défossez et al., arXiv:2210.13438)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lstm = conv(3, 8, dims=1), nn.LSTM(8, 8)
        self.units = nn.Sequential(Unit(dims=1), Unit(dims=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.stem(x).permute(2, 0, 1))[0]
        return self.units(x.permute(1, 2, 0))


class Blueprint(nn.Sequential):
    """A separable convolution, the pointwise one first (Haase and Amthor, arXiv:2003.13549)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(conv(inputs, outputs, 1), *unit(outputs, outputs, groups=outputs))


@structure(IMAGE, sites={"0": 8, "1": 8, "3": 12, "4": 12}, kind="chain")
class YuNet(nn.Sequential):
    """Between two depthwise convolutions stands no projection, but the first half of the next unit."""

    def __init__(self) -> None:
        units = Blueprint(3, 8), Blueprint(8, 8), nn.MaxPool2d(2), Blueprint(8, 12), Blueprint(12, 12)
        super().__init__(*units, nn.Conv2d(12, 2, 1))


class TasUnit(nn.Module):
    """A residual and a skip output, each of which its caller adds to something (Luo and Mesgarani, arXiv:1809.07454)."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(8, 16, 1), nn.PReLU(), conv(16, 16, dims=1, groups=16), nn.PReLU(), nn.GroupNorm(1, 16)
        )
        self.residual, self.skip = None if last else nn.Conv1d(16, 8, 1), nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        y = self.layers(x)
        return None if self.residual is None else self.residual(y), self.skip(y)


@structure(WAVE, sites={f"units.{i}": 16 for i in range(3)}, kind="inverted", after="layers")
class ConvTasNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(TasUnit(i == 2) for i in range(3))
        self.head = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for layer in self.units:
            residual, skip = layer(x)
            x = x if residual is None else x + residual
            total = total + skip
        return self.head(F.relu(total))


# Shortcuts without weights ---------------------------------------------------------------------------------------------


class Down(nn.Module):
    """A strided convolution beside averaged channels of the pixel-unshuffled input (Chen et al., arXiv:2410.10733)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.pixel_unshuffle(x, 2).unflatten(1, (-1, 2)).mean(2)


@structure(IMAGE, sites={"1": 8, "3": 16})
class AutoencoderDC(nn.Sequential):
    """No sum to be fused, and a layer between stages: it is no block."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8), Unit(), Down(), Unit(16), conv(16, 4))


# Complex convolutions -------------------------------------------------------------------------------------------------


class ComplexConv(nn.Module):
    """The real and the imaginary part, side by side in the channels (DCCRN, arXiv:2008.00264)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.real, self.imag = (conv(channels // 2, channels // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([self.real(a) - self.imag(b), self.real(b) + self.imag(a)], 1)


@joined()
class ComplexUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ComplexConv(), ComplexConv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


@structure(IMAGE, refused="complex")
class ComplexNumbers(nn.Module):
    """SE is for real values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.complex(self.stem(x), self.stem(x))
        return torch.view_as_real(x + torch.tanh(self.unit(x)))


# Activations ----------------------------------------------------------------------------------------------------------


@structure(WAVE, sites={"se_attention": 8, "se_attention_2": 8}, kind="chain")
class Transposed(nn.Module):
    """A transpose between the convolution and its activation, for a norm over the last dim."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(8, 8, dims=1), conv(8, 8, dims=1)
        self.norm1, self.norm2, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(F.relu(self.conv1(x).transpose(1, 2))).transpose(1, 2)
        return self.head(self.norm2(F.relu(self.conv2(x).transpose(1, 2))).mean(1))


class TLU(nn.Module):
    """The thresholded unit of filter response norms (Singh and Krishnan, arXiv:1911.09737)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.tau - 1)


@structure(IMAGE, sites={"0": 8, "1": 8, "2": 8}, kind="chain")
class Thresholded(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(conv(i, 8), TLU(8)) for i in (3, 8, 8)), conv(8, 2))


class MFM(nn.Module):
    """The maximum of two halves (Wu et al., arXiv:1511.02683)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.filter = conv(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.filter(x).chunk(2, 1)
        return torch.max(a, b)


@structure(IMAGE, sites={"0": 8, "1": 8}, kind="chain")
class LightCNN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(MFM(3, 8), MFM(8, 8), conv(8, 2))


class PReLUConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.act, self.conv = nn.PReLU(inputs), conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x))


@structure(IMAGE, sites={"blocks.1": 8, "blocks.2": 12}, kind="chain")
class Pyramid(nn.Module):
    """Convolutions behind their activations, the outputs of which are pooled and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PReLUConv(i, o) for i, o in ((3, 8), (8, 12), (12, 12)))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Any) -> Tensor:
        pooled = []
        for block in self.blocks:
            x = block(x)
            pooled.append(F.adaptive_max_pool2d(x, 1).flatten(1))
        return self.head(torch.cat(pooled, 1))
