"""Networks for signals: EEG, audio, speech, video."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from structure import Unit, conv, structure, unit
from torch import Tensor, nn

EEG = torch.randn(2, 1, 6, 64)
WAVE = torch.randn(2, 8, 40)
SPECTRUM = torch.randn(2, 1, 16, 24)
MASK = (torch.arange(40)[None, None] < torch.tensor([40, 25])[:, None, None]).float()
CLIP = torch.randn(2, 3, 4, 12, 12)

# Maps of width 1 ------------------------------------------------------------------------------------------------------


@structure(EEG, sites={"spatial.2": 16, "separable.3": 16}, kind="chain")
class EEGNet(nn.Module):
    """A depthwise convolution over all electrodes leaves maps of height 1 (Lawhern et al., arXiv:1611.08024)."""

    def __init__(self) -> None:
        super().__init__()
        self.temporal = nn.Sequential(conv(1, 8, (1, 9)), nn.BatchNorm2d(8))
        self.spatial = nn.Sequential(
            nn.Conv2d(8, 16, (6, 1), groups=8), nn.BatchNorm2d(16), nn.ELU(), nn.AvgPool2d((1, 4)), nn.Dropout(0.25)
        )
        self.separable = nn.Sequential(
            conv(16, 16, (1, 5), groups=16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ELU(), nn.AvgPool2d((1, 2))
        )
        self.head = nn.Linear(16 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.separable(self.spatial(self.temporal(x))).flatten(1))


@structure(EEG, sites={"first.3": 8, "layers.0.3": 12, "layers.1.3": 16}, kind="chain")
class DeepConvNet(nn.Module):
    """Maps (N, C, T, 1), each pooled over time (Schirrmeister et al., arXiv:1703.05051)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            conv(1, 8, (9, 1)), nn.Conv2d(8, 8, (1, 6)), nn.BatchNorm2d(8), nn.ELU(), nn.MaxPool2d((3, 1))
        )
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Dropout(), conv(i, o, (5, 1)), nn.BatchNorm2d(o), nn.ELU(), nn.MaxPool2d((3, 1)))
            for i, o in ((8, 12), (12, 16))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(2, 3))
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)


@structure(SPECTRUM, sites={"units.0": 8, "units.1": 8})
class Frequencies(nn.Module):
    """The mean over the frequencies, and residual units over time behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(1, 8)
        self.units = nn.Sequential(Unit(8, kernel=(1, 3)), Unit(8, kernel=(1, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x).mean(2, keepdim=True)).mean((2, 3))


@structure(SPECTRUM, sites={"units.0": 8})
class Pooled(nn.Module):
    """The same with the dim gone, and 1d units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(1, 8)
        self.units = nn.Sequential(Unit(8, dims=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x).mean(2)).mean(2)


# Containers, loops, scripts -------------------------------------------------------------------------------------------


class Pathways(nn.Module):
    """A stage of a two-pathway network, which writes into the list that it is given (SlowFast, arXiv:1812.03982)."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = Unit(8, dims=3), Unit(4, dims=3)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for index, block in enumerate((self.slow, self.fast)):
            x[index] = block(x[index])
        return x


@structure(
    [CLIP[:, :, ::2], CLIP],
    sites={"first.slow": 8, "first.fast": 4, "second.slow": 8, "second.fast": 4},
)
class SlowFast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = unit(3, 8, dims=3), unit(3, 4, dims=3)
        self.first, self.second = Pathways(), Pathways()
        self.lateral = nn.Conv3d(4, 8, (3, 1, 1), (2, 1, 1), (1, 0, 0))

    def forward(self, x: list[Tensor]) -> Tensor:
        x[0], x[1] = self.slow(x[0]), self.fast(x[1])
        x = self.first(x)
        x[0] = x[0] + self.lateral(x[1])
        x = self.second(x)
        return torch.cat([y.mean((2, 3, 4)) for y in x], 1)


@structure({"video": CLIP}, sites={"unit": 8})
class Dictionary(nn.Module):
    """Keeps its features in the dict that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = unit(3, 8, dims=3), Unit(8, dims=3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        x["features"] = self.stem(x.pop("video"))
        x["features"] = self.unit(x["features"])
        return x["features"]


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # deprecated, and met in many networks
    swish = torch.jit.script(swish)


class Scripted(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(swish(self.conv1(x)))


@structure(torch.randn(2, 3, 10, 10), sites={"units.0": 8, "units.1": 8})
class ScriptedFunctions(nn.Module):
    """Activations by ``torch.jit.script``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = conv(3, 8), nn.Sequential(Scripted(), Scripted())

    def forward(self, x: Tensor) -> Tensor:
        return self.units(swish(self.stem(x)))


@structure(WAVE, sites={"norms.0": 12, "norms.1": 16, "se_attention": 8}, kind="chain")
class Zipped(nn.Module):
    """One expression of a loop, of other widths each time: SE goes before the activation, where each has a module of its own; of
    the last behind the loop."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((8, 12), (12, 16), (16, 8))
        self.convs = nn.ModuleList(conv(*w, dims=1) for w in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(o) for _, o in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return x.mean(2)


@structure(WAVE, sites={"layers.0.2": 12, "layers.1.2": 16, "layers.2.2": 8}, kind="chain")
class Listed(nn.Module):
    """Layers of other widths, called by their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(unit(*w, dims=1) for w in ((8, 12), (12, 16), (16, 8)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward(x)
        return x.mean(2)


# Gated blocks, and masks ----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A unit of a text-to-speech network, with its padding masked (VITS, arXiv:2106.06103)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(conv(channels, channels, dims=1, dilation=d) for d in (1, 3))
        self.convs2 = nn.ModuleList(conv(channels, channels, dims=1) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for c1, c2 in zip(self.convs1, self.convs2, strict=True):
            y = c1(F.leaky_relu(x, 0.1) * mask)
            x = c2(F.leaky_relu(y, 0.1) * mask) + x
        return x * mask


@structure(WAVE, MASK, sites={"unit.convs2.0": 8, "unit.convs2.1": 8})
class Vits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = conv(8, 8, dims=1), Masked()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.unit(self.stem(x) * mask, mask)


@structure(WAVE, torch.tensor([40, 25]), sites={"se_attention": 8, "se_attention_2": 8}, kind="chain")
class Durations(nn.Module):
    """A chain whose input is masked before each convolution, by lengths (FastSpeech, arXiv:1905.09263)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.proj = conv(8, 8, dims=1), conv(8, 8, dims=1), nn.Conv1d(8, 1, 1)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(x.shape[-1])[None] < lengths[:, None]).unsqueeze(1).to(x.dtype)
        x = self.act1(self.conv1(x * mask)) * mask
        x = self.act2(self.conv2(x)) * mask
        return self.proj(x) * mask


@structure(SPECTRUM, sites={"units.0": 8, "units.1": 8})
class Dropped(nn.Module):
    """Silent frames are masked: no channel attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = conv(1, 8), nn.Sequential(Unit(), Unit())

    def forward(self, x: Tensor) -> Tensor:
        heard = torch.clamp(x.abs().sum((1, 2), keepdim=True) * 10, 0, 1)
        return self.units(self.stem(x) * heard) * heard


class MaskedUnit(nn.Module):
    """A dilated layer of a temporal network, which is masked behind its add (MS-TCN, arXiv:1903.01945)."""

    def __init__(self, channels: int = 8, dilation: int = 1) -> None:
        super().__init__()
        self.dilated = conv(channels, channels, dims=1, dilation=dilation)
        self.mix, self.dropout = nn.Conv1d(channels, channels, 1), nn.Dropout()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = self.dropout(self.mix(F.relu(self.dilated(x))))
        return (x + out) * mask[:, 0:1, :]


@structure(WAVE, MASK, sites={f"{s}.layers.{i}": 8 for s in ("first", "rest.0") for i in range(2)})
class Stages(nn.Module):
    """Stages whose predictions are refined, and all returned."""

    class Stage(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.enter, self.leave = nn.Conv1d(inputs, 8, 1), nn.Conv1d(8, 5, 1)
            self.layers = nn.ModuleList(MaskedUnit(8, 2**i) for i in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.enter(x)
            for layer in self.layers:
                x = layer(x, mask)
            return self.leave(x) * mask

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = self.Stage(8), nn.ModuleList([self.Stage(5)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = self.first(x, mask)
        outputs = out.unsqueeze(0)
        for stage in self.rest:
            out = stage(F.softmax(out, dim=1) * mask, mask)
            outputs = torch.cat((outputs, out.unsqueeze(0)), dim=0)
        return outputs


class GatedLayer(nn.Module):
    """tanh times sigmoid, a residual and a skip output, masked (WaveNet, arXiv:1609.03499)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dilated = conv(channels, 2 * channels, dims=1)
        self.residual, self.skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.dilated(x).chunk(2, 1)
        y = torch.tanh(a) * torch.sigmoid(b)
        return (x + self.residual(y)) * mask, self.skip(y)


@structure(WAVE, MASK, sites={"layers.0": 8, "layers.1": 8})
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([GatedLayer(), GatedLayer()]), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, skip = layer(x, mask)
            total = total + skip
        return self.head((total + x) * mask)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(conv(8, 8, dims=1), nn.ReLU(), conv(8, 8, dims=1)) for _ in range(3))


@structure(WAVE, sites={f"layers.{i}": 8 for i in range(3)})
class Summed(Stream):
    """A stream whose stages are summed up as well."""

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for layer in self.layers:
            x = x + layer(x)
            total = total + x
        return total


@structure(WAVE, sites={f"layers.{i}": 8 for i in range(3)})
class Yielded(Stream):
    """A stream whose stages are all returned."""

    def forward(self, x: Tensor) -> list[Tensor]:
        stages = []
        for layer in self.layers:
            x = layer(x) + x
            stages.append(x)
        return stages


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
