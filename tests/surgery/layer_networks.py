"""Layers beside plain convolutions: deformable ones, attention, and activations of other kinds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from structure import Unit, conv, joined, module_of, structure, unit
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

IMAGE = torch.randn(2, 3, 12, 12)
WAVE = torch.randn(2, 8, 40)

# Other convolutions, and norms ----------------------------------------------------------------------------------------


def deformable() -> dict[str, nn.Module]:
    layers = {f"conv{i}": DeformConv2d(8, 8, 3, padding=1) for i in (1, 2)}
    return {"offset1": conv(8, 18), "offset2": conv(8, 18), **layers}


@joined("", parts=deformable)
def Deformed(self, x: Tensor) -> Tensor:
    """Two deformable convolutions (Dai et al., arXiv:1703.06211)."""
    y = F.relu(self.conv1(x, self.offset1(x)))
    return x + self.conv2(y, self.offset2(y))


def routed() -> dict[str, Any]:
    route = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    return {"weight": nn.Parameter(torch.randn(3, 8, 8, 3, 3) * 0.1), "norm": nn.BatchNorm2d(8), "route": route}


@joined("", parts=routed)
def DynamicConv(self, x: Tensor) -> Tensor:
    """A convolution whose weight is mixed for each image (Chen et al., arXiv:1912.03458)."""
    b, c, h, w = x.shape
    attention = F.softmax(self.route(x.mean((2, 3))) / 30, dim=1)
    weight = torch.mm(attention, self.weight.flatten(1)).view(-1, c, 3, 3)
    out = F.conv2d(x.view(1, -1, h, w), weight, padding=1, groups=b).view(b, -1, h, w)
    return x + F.relu(self.norm(out))


class WrittenOut(nn.Module):
    """A norm with fixed statistics, as FrozenBatchNorm2d and its like write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        for name, low, high in (("mean", -1, 1), ("shift", -1, 1), ("scale", 0.5, 1.5)):
            self.register_buffer(name, torch.linspace(low, high, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "scale, shift":
            return x * self.scale + self.shift
        return (x - self.mean) * self.scale if self.form == "shift, scale" else (x - self.mean) / self.scale


def frozen_unit(self, x: Tensor) -> Tensor:
    return x + self.norm2(self.conv2(self.conv1(x).relu()))


for form in ("scale, shift", "shift, scale", "shift, quotient"):
    block = module_of(lambda form=form: {"conv1": conv(8, 8), "conv2": conv(8, 8), "norm2": WrittenOut(form)})
    joined("norm2", name=f"frozen norm: {form}")(block(frozen_unit))


@module_of(lambda: {"weight": nn.Parameter(torch.randn(8, 8, 3, 3)), "conv1": conv(8, 8), "conv2": conv(8, 8)})
def Centred(self, x: Tensor) -> Tensor:
    """A convolution whose weight is computed in the forward (Qiao et al., arXiv:1903.10520), so that no layer has a path."""
    weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
    x = F.conv2d(x, weight, padding=1).relu()
    return x + self.conv2(self.conv1(x).relu())


@structure(IMAGE, sites={"1": 8, "2": 8}, after="conv2", skipped={"1": "plain chain"})
def WeightCentred() -> nn.Module:
    return nn.Sequential(conv(3, 8), Centred(), Centred())


# Attention ------------------------------------------------------------------------------------------------------------


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


@structure(IMAGE, sites={"0": 8, "2": 8, "4": 8, "6": 8}, kind="chain")
def SAGAN() -> nn.Module:
    """A chain with attention in between: the odd branch gets no SE, and the chain gets its own."""
    attentions = Attention(), Attention(depthwise(norm=False)), Attention(depthwise(norm=True))
    between = [m for attention in attentions for m in (attention, unit(8, 8))]
    return nn.Sequential(unit(3, 8), *between, conv(8, 2))


@structure(IMAGE, sites={"1": 8})
def EfficientFormer() -> nn.Module:
    """Local features are added to the values and activated with them (Li et al., arXiv:2212.08059)."""
    return nn.Sequential(unit(3, 8), Attention(depthwise(norm=True), nn.GELU()), conv(8, 2))


@module_of(
    lambda: {"first": unit(8, 4, 1), "last": unit(4, 8, 1), "rows": conv(4, 4, (5, 1)), "columns": conv(4, 4, (1, 5))}
)
def Bilinear(self, x: Tensor) -> Tensor:
    """Convolutions of rows and columns make the weights of attention, by a sigmoid and a norm of their own."""
    y = self.first(x)
    p, q = self.rows(y).sigmoid(), self.columns(y).sigmoid()
    p, q = p / p.sum(3, keepdim=True), q / q.sum(2, keepdim=True)
    return x + self.last(p.matmul(y).matmul(q))


@module_of(lambda: {"attention": Bilinear()}, Unit)
def Attended(self, x: Tensor) -> Tensor:
    return (x + self.norm2(self.conv2(self.attention(self.norm1(self.conv1(x)).relu())))).relu()


@structure(IMAGE, sites={"1": 8, "2": 8}, after="norm2")
def BAT() -> nn.Module:
    """Attention inside of residual units (Chi et al., arXiv:2006.03318): SE is the unit's, not the attention's."""
    return nn.Sequential(conv(3, 8), Attended(), Attended())


def wave_to_vec() -> dict[str, nn.Module]:
    layers = [m for i in (1, 8, 8) for m in (nn.Conv1d(i, 8, 3, 2), nn.GroupNorm(8, 8), nn.GELU())]
    last = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return {"features": nn.Sequential(*layers), "position": conv(8, 8, 5, 1, groups=2), "layer": last}


@structure(
    torch.randn(2, 1, 64), parts=wave_to_vec, sites={"features.2": 8, "features.5": 8, "features": 8}, kind="chain"
)
def Wave2Vec(self, x: Tensor) -> Tensor:
    """A convolutional feature extractor, and positions by a convolution (Baevski et al., arXiv:2006.11477)."""
    y = self.features(x).transpose(1, 2)
    y = y + F.gelu(self.position(y.transpose(1, 2))).transpose(1, 2)
    return self.layer(y)


@structure(
    torch.randn(1, 3, 16),
    parts=lambda: {
        "stem": conv(3, 8, dims=1),
        "lstm": nn.LSTM(8, 8),
        "units": nn.Sequential(Unit(dims=1), Unit(dims=1)),
    },
    sites={"units.0": 8, "units.1": 8},
)
def TimeFirst(self, x: Tensor) -> Tensor:
    """A recurrent layer with time before a batch of one: nothing is pooled (EnCodec, Défossez et al., arXiv:2210.13438)."""
    x = self.lstm(self.stem(x).permute(2, 0, 1))[0]
    return self.units(x.permute(1, 2, 0))


# Separable convolutions -----------------------------------------------------------------------------------------------


@structure(IMAGE, sites={"0": 8, "1": 8, "3": 12, "4": 12}, kind="chain")
def YuNet() -> nn.Module:
    """Separable convolutions, the pointwise one first (Haase and Amthor, arXiv:2003.13549): between two depthwise ones stands no
    projection, but the first half of the next unit."""
    first, second, third, fourth = (
        nn.Sequential(conv(i, o, 1), *unit(o, o, groups=o)) for i, o in ((3, 8), (8, 8), (8, 12), (12, 12))
    )
    return nn.Sequential(first, second, nn.MaxPool2d(2), third, fourth, nn.Conv2d(12, 2, 1))


@module_of(lambda act: {"conv": conv(8, 8), "act": act})
def WithAct(self, x: Tensor) -> Tensor:
    return self.act(self.conv(x))


@structure(IMAGE, sites={"2": 8, "3": 8}, kind="chain", after="1", skipped={"0": "several times"})
def SharedActivation() -> nn.Module:
    """All convolutions share one activation, which is named by its path in the network (YOLO's in ultralytics)."""
    act = nn.ReLU()
    return nn.Sequential(conv(3, 8), act, WithAct(act), WithAct(act), nn.Conv2d(8, 2, 1))


def tas_unit(last: bool) -> dict[str, nn.Module | None]:
    layers = nn.Conv1d(8, 16, 1), nn.PReLU(), conv(16, 16, dims=1, groups=16), nn.PReLU(), nn.GroupNorm(1, 16)
    residual = None if last else nn.Conv1d(16, 8, 1)
    return {"layers": nn.Sequential(*layers), "residual": residual, "skip": nn.Conv1d(16, 8, 1)}


@module_of(tas_unit)
def TasUnit(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """A residual and a skip output, each of which its caller adds to something (Luo and Mesgarani, arXiv:1809.07454)."""
    y = self.layers(x)
    return None if self.residual is None else self.residual(y), self.skip(y)


@structure(
    WAVE,
    parts=lambda: {"units": nn.ModuleList(TasUnit(i == 2) for i in range(3)), "head": nn.Conv1d(8, 2, 1)},
    sites={f"units.{i}": 16 for i in range(3)},
    kind="inverted",
    after="layers",
)
def ConvTasNet(self, x: Tensor) -> Tensor:
    total: Tensor | float = 0.0
    for layer in self.units:
        residual, skip = layer(x)
        x = x if residual is None else x + residual
        total = total + skip
    return self.head(F.relu(total))


# Shortcuts without weights, and complex convolutions --------------------------------------------------------------------


@module_of(lambda: {"conv": nn.Conv2d(8, 16, 3, 2, 1)})
def Down(self, x: Tensor) -> Tensor:
    """A strided convolution beside averaged channels of the pixel-unshuffled input (Chen et al., arXiv:2410.10733)."""
    return self.conv(x) + F.pixel_unshuffle(x, 2).unflatten(1, (-1, 2)).mean(2)


@structure(IMAGE, sites={"1": 8, "3": 16})
def AutoencoderDC() -> nn.Module:
    """No sum to be fused, and a layer between stages: it is no block."""
    return nn.Sequential(conv(3, 8), Unit(), Down(), Unit(16), conv(16, 4))


@module_of(lambda: {"real": conv(4, 4), "imag": conv(4, 4)})
def ComplexConv(self, x: Tensor) -> Tensor:
    """The real and the imaginary part, side by side in the channels (DCCRN, arXiv:2008.00264)."""
    a, b = x.chunk(2, 1)
    return torch.cat([self.real(a) - self.imag(b), self.real(b) + self.imag(a)], 1)


@joined(parts=lambda: {"conv1": ComplexConv(), "conv2": ComplexConv()})
def ComplexUnit(self, x: Tensor) -> Tensor:
    return x + self.conv2(F.relu(self.conv1(x)))


@structure(
    IMAGE,
    parts=lambda: {"stem": conv(3, 8), "unit": nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64)},
    refused="complex",
)
def ComplexNumbers(self, x: Tensor) -> Tensor:
    """SE is for real values."""
    x = torch.complex(self.stem(x), self.stem(x))
    return torch.view_as_real(x + torch.tanh(self.unit(x)))


# Activations ----------------------------------------------------------------------------------------------------------


@module_of(lambda inputs: {"filter": conv(inputs, 16)})
def MFM(self, x: Tensor) -> Tensor:
    """The maximum of two halves (Wu et al., arXiv:1511.02683)."""
    a, b = self.filter(x).chunk(2, 1)
    return torch.max(a, b)


@structure(IMAGE, sites={"0": 8, "1": 8}, kind="chain")
def LightCNN() -> nn.Module:
    return nn.Sequential(MFM(3), MFM(8), conv(8, 2))


class ActivatedConv(nn.Conv2d):
    """A convolution that calls its norm and activation itself (Detectron2; ``ConvBnReLU2d`` of torch.ao is one, too)."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, 3, padding=1, **options)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(x)))


@structure(IMAGE, sites={"0": 8, "1": 8}, kind="chain", skipped={"2": "a prediction"})
def ActivatedConvs() -> nn.Module:
    return nn.Sequential(ActivatedConv(3, 8), ActivatedConv(8, 8), conv(8, 2))


@structure(IMAGE, sites={"1.0": 8, "2.0": 8}, kind="inverted", skipped={"0": "a plain chain beside"})
def ActivatedInverted() -> nn.Module:
    """Inverted bottlenecks of such convolutions."""
    cores = (nn.Sequential(ActivatedConv(8, 8, groups=8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(2))
    return nn.Sequential(ActivatedConv(3, 8), *cores, conv(8, 2))


def pyramid() -> dict[str, nn.Module]:
    blocks = (nn.Sequential(nn.PReLU(i), conv(i, o)) for i, o in ((3, 8), (8, 12), (12, 12)))
    return {"blocks": nn.ModuleList(blocks), "head": nn.Linear(32, 3)}


@structure(IMAGE, parts=pyramid, sites={"blocks.1.0": 8, "blocks.2.0": 12}, kind="chain")
def Pyramid(self, x: Tensor) -> Tensor:
    """Convolutions behind their activations, the outputs of which are pooled and concatenated."""
    pooled = []
    for block in self.blocks:
        x = block(x)
        pooled.append(F.adaptive_max_pool2d(x, 1).flatten(1))
    return self.head(torch.cat(pooled, 1))


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
