"""Networks for signals: EEG, audio, speech, video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from structure import Unit, conv, joined, module_of, structure, unit
from torch import Tensor, nn

EEG = torch.randn(2, 1, 6, 64)
WAVE = torch.randn(2, 8, 40)
SPECTRUM = torch.randn(2, 1, 16, 24)
MASK = (torch.arange(40)[None, None] < torch.tensor([40, 25])[:, None, None]).float()
CLIP = torch.randn(2, 3, 4, 12, 12)

# Maps of width 1 ------------------------------------------------------------------------------------------------------


@structure(EEG, sites={"1.2": 16, "2": 16}, kind="chain")
def EEGNet() -> nn.Module:
    """A depthwise convolution over all electrodes leaves maps of height 1 (Lawhern et al., arXiv:1611.08024)."""
    temporal = conv(1, 8, (1, 9)), nn.BatchNorm2d(8)
    spatial = nn.Conv2d(8, 16, (6, 1), groups=8), nn.BatchNorm2d(16), nn.ELU(), nn.AvgPool2d((1, 4))
    separable = conv(16, 16, (1, 5), groups=16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ELU()
    head = nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(16 * 8, 4)
    return nn.Sequential(*(nn.Sequential(*layers) for layers in (temporal, spatial, separable, head)))


def over_time() -> dict[str, nn.Module]:
    return {"stem": unit(1, 8), "units": nn.Sequential(Unit(8, kernel=(1, 3)), Unit(8, kernel=(1, 3)))}


@structure(SPECTRUM, parts=over_time, sites={"units.0": 8, "units.1": 8})
def Frequencies(self, x: Tensor) -> Tensor:
    """The mean over the frequencies, and residual units over time behind it."""
    return self.units(self.stem(x).mean(2, keepdim=True)).mean((2, 3))


# Containers, loops, scripts -------------------------------------------------------------------------------------------


@module_of(lambda: {"slow": Unit(8, dims=3), "fast": Unit(4, dims=3)})
def Pathways(self, x: list[Tensor]) -> list[Tensor]:
    """A stage of a two-pathway network, which writes into the list that it is given (SlowFast, arXiv:1812.03982)."""
    for index, block in enumerate((self.slow, self.fast)):
        x[index] = block(x[index])
    return x


def pathways() -> dict[str, nn.Module]:
    stems = {"slow": unit(3, 8, dims=3), "fast": unit(3, 4, dims=3)}
    lateral = nn.Conv3d(4, 8, (3, 1, 1), (2, 1, 1), (1, 0, 0))
    return {**stems, "first": Pathways(), "second": Pathways(), "lateral": lateral}


@structure(
    [CLIP[:, :, ::2], CLIP],
    parts=pathways,
    sites={"first.slow": 8, "first.fast": 4, "second.slow": 8, "second.fast": 4},
)
def SlowFast(self, x: list[Tensor]) -> Tensor:
    x[0], x[1] = self.slow(x[0]), self.fast(x[1])
    x = self.first(x)
    x[0] = x[0] + self.lateral(x[1])
    x = self.second(x)
    return torch.cat([y.mean((2, 3, 4)) for y in x], 1)


@structure({"video": CLIP}, parts=lambda: {"stem": unit(3, 8, dims=3), "unit": Unit(8, dims=3)}, sites={"unit": 8})
def Dictionary(self, x: dict[str, Tensor]) -> Tensor:
    """Keeps its features in the dict that it is given."""
    x["features"] = self.stem(x.pop("video"))
    x["features"] = self.unit(x["features"])
    return x["features"]


def no_meta(x: Tensor) -> None:
    """Fails on meta as scripted functions may, in words that don't say so."""
    if x.is_meta:
        raise RuntimeError("Unknown device for graph fuser")


def stem_and_unit() -> dict[str, nn.Module]:
    return {"stem": conv(3, 8), "unit": Unit()}


@structure(torch.randn(2, 3, 10, 10), parts=stem_and_unit, sites={"unit": 8})
def FailsOnMeta(self, x: Tensor) -> Tensor:
    """What fails on meta is tried with values."""
    no_meta(x)
    return self.unit(self.stem(x))


@structure(torch.randn(2, 3, 10, 10), parts=stem_and_unit, refused="expected input.* to have 3 channels, but got 8")
def FailsEither(self, x: Tensor) -> Tensor:
    """The reason is the one that is met with values."""
    no_meta(x)
    return self.unit(self.stem(self.stem(x)))


def zipped() -> dict[str, nn.Module]:
    widths = ((8, 12), (12, 16), (16, 8))
    convs = nn.ModuleList(conv(*w, dims=1) for w in widths)
    return {"convs": convs, "norms": nn.ModuleList(nn.BatchNorm1d(o) for _, o in widths)}


@structure(WAVE, parts=zipped, sites={"norms.0": 12, "norms.1": 16, "se_attention": 8}, kind="chain")
def Zipped(self, x: Tensor) -> Tensor:
    """One expression of a loop, of other widths each time: SE goes before the activation, where each has a module of its own; of
    the last behind the loop."""
    for layer, norm in zip(self.convs, self.norms, strict=True):
        x = F.relu(norm(layer(x)))
    return x.mean(2)


# Gated blocks, and masks ----------------------------------------------------------------------------------------------


def durations() -> dict[str, nn.Module]:
    convs = {f"conv{i}": conv(8, 8, dims=1) for i in (1, 2)}
    return {**convs, "act1": nn.ReLU(), "act2": nn.ReLU(), "proj": nn.Conv1d(8, 1, 1)}


@structure(WAVE, torch.tensor([40, 25]), parts=durations, sites={"se_attention": 8, "se_attention_2": 8}, kind="chain")
def Durations(self, x: Tensor, lengths: Tensor) -> Tensor:
    """A chain whose input is masked before each convolution, by lengths (FastSpeech, arXiv:1905.09263)."""
    mask = (torch.arange(x.shape[-1])[None] < lengths[:, None]).unsqueeze(1).to(x.dtype)
    x = self.act1(self.conv1(x * mask)) * mask
    x = self.act2(self.conv2(x)) * mask
    return self.proj(x) * mask


@joined("", parts=lambda: {"body": nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8))})
def Heard(self, x: Tensor) -> Tensor:
    """Silent frames are masked by the energy of the features: a factor with an extent in time is no channel attention."""
    heard = torch.clamp(x.abs().mean((1, 2), keepdim=True) * 10, 0, 1)
    return x + self.body(x) * heard


@module_of(lambda: {"dilated": conv(8, 16, dims=1), "residual": nn.Conv1d(8, 8, 1), "skip": nn.Conv1d(8, 8, 1)})
def GatedLayer(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """tanh times sigmoid, a residual and a skip output, masked (WaveNet, arXiv:1609.03499)."""
    a, b = self.dilated(x).chunk(2, 1)
    y = torch.tanh(a) * torch.sigmoid(b)
    return (x + self.residual(y)) * mask, self.skip(y)


@structure(
    WAVE,
    MASK,
    parts=lambda: {"layers": nn.ModuleList([GatedLayer(), GatedLayer()]), "head": nn.Conv1d(8, 2, 1)},
    sites={"layers.0": 8, "layers.1": 8},
)
def WaveNet(self, x: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for layer in self.layers:
        x, skip = layer(x, mask)
        total = total + skip
    return self.head((total + x) * mask)


def layers_and_length() -> dict[str, nn.Module]:
    return {
        "layers": nn.ModuleList([GatedLayer(), GatedLayer()]),
        "head": nn.Conv1d(8, 2, 1),
        "length": nn.Linear(8, 1),
    }


@structure(WAVE, parts=layers_and_length, sites={"layers.0": 8, "layers.1": 8})
def PredictedLength(self, x: Tensor) -> Tensor:
    """A mask up to a length that is computed from pooled features is no channel attention (VITS, arXiv:2106.06103)."""
    length = self.length(x.mean(2)).exp() * 20
    mask = (torch.arange(x.shape[-1], device=x.device)[None] < length).unsqueeze(1).to(x.dtype)
    return WaveNet.forward(self, x, mask)


def gated() -> dict[str, nn.Module]:
    enter = nn.ModuleList(conv(8, 16, dims=1, dilation=2**i) for i in range(3))
    return {"enter": enter, "leave": nn.ModuleList(nn.Conv1d(8, width, 1) for width in (16, 16, 8))}


@module_of(gated)
def WN(self, x: Tensor, mask: Tensor) -> Tensor:
    """The same in a loop, with both outputs from one convolution, the second of which are summed up (WaveGlow, arXiv:1811.00002)."""
    total = torch.zeros_like(x)
    for i, (enter, leave) in enumerate(zip(self.enter, self.leave, strict=True)):
        a, b = enter(x).chunk(2, 1)
        both = leave(torch.tanh(a) * torch.sigmoid(b))
        if i < len(self.leave) - 1:
            x = (x + both[:, :8]) * mask
            total = total + both[:, 8:]
        else:
            total = total + both
    return total * mask


@structure(
    WAVE,
    MASK,
    parts=lambda: {"stem": nn.Conv1d(8, 8, 1), "wn": WN(), "head": nn.Conv1d(8, 2, 1)},
    sites={"wn.leave.0": 16, "wn.leave.1": 16},
)
def Flow(self, x: Tensor, mask: Tensor) -> Tensor:
    return self.head(self.wn(self.stem(x) * mask, mask))


class Injected(nn.Module):
    """A layer of one stream, to whose convolution another stream's is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unit = conv(8, 8, dims=1), Unit(dims=1)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        return self.unit(x if other is None else x + other)


def streams() -> dict[str, nn.Module]:
    return {name: nn.ModuleList([Injected(), Injected()]) for name in ("times", "spectra")}


@structure(WAVE, parts=streams, sites={f"{s}.{i}.unit": 8 for s in ("times", "spectra") for i in range(2)})
def HDemucs(self, x: Tensor) -> Tensor:
    """Two streams become one (Défossez, arXiv:2111.03600)."""
    y = self.times[1](self.times[0](x))
    return self.spectra[1](self.spectra[0](x.flip(2)), y)


def transposed() -> dict[str, nn.Module]:
    convs = {f"conv{i}": conv(8, 8, dims=1) for i in (1, 2)}
    return {**convs, "norm1": nn.LayerNorm(8), "norm2": nn.LayerNorm(8), "head": nn.Linear(8, 3)}


@structure(WAVE, parts=transposed, sites={"se_attention": 8, "se_attention_2": 8}, kind="chain")
def Transposed(self, x: Tensor) -> Tensor:
    """A transpose between the convolution and its activation, for a norm over the last dim."""
    x = self.norm1(F.relu(self.conv1(x).transpose(1, 2))).transpose(1, 2)
    return self.head(self.norm2(F.relu(self.conv2(x).transpose(1, 2))).mean(1))
