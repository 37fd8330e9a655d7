"""Networks for signals: EEG, audio, speech, video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from join_networks import joined
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


@structure(SPECTRUM, sites={"units.0": 8, "units.1": 8})
class Frequencies(nn.Module):
    """The mean over the frequencies, and residual units over time behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(1, 8)
        self.units = nn.Sequential(Unit(8, kernel=(1, 3)), Unit(8, kernel=(1, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x).mean(2, keepdim=True)).mean((2, 3))


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


def no_meta(x: Tensor) -> None:
    """Fails on meta as scripted functions may, in words that don't say so."""
    if x.is_meta:
        raise RuntimeError("Unknown device for graph fuser")


@structure(torch.randn(2, 3, 10, 10), sites={"1": 8})
class FailsOnMeta(nn.Sequential):
    """What fails on meta is tried with values."""

    def __init__(self) -> None:
        super().__init__(conv(3, 8), Unit())

    def forward(self, x: Tensor) -> Tensor:
        no_meta(x)
        return super().forward(x)


@structure(torch.randn(2, 3, 10, 10), refused="expected input.* to have 3 channels, but got 8")
class FailsEither(FailsOnMeta):
    """The reason is the one that is met with values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self[0](x))


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


# Gated blocks, and masks ----------------------------------------------------------------------------------------------


@joined("", MASK, example=WAVE, at=(".convs2.0", ".convs2.1"))
class Vits(nn.Module):
    """A unit of a text-to-speech network, with its padding masked (VITS, arXiv:2106.06103)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(conv(8, 8, dims=1, dilation=d) for d in (1, 3))
        self.convs2 = nn.ModuleList(conv(8, 8, dims=1) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for c1, c2 in zip(self.convs1, self.convs2, strict=True):
            y = c1(F.leaky_relu(x, 0.1) * mask)
            x = c2(F.leaky_relu(y, 0.1) * mask) + x
        return x * mask


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


@joined("")
class Heard(nn.Module):
    """Silent frames are masked by the energy of the features: a factor with an extent in time is no channel attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        heard = torch.clamp(x.abs().mean((1, 2), keepdim=True) * 10, 0, 1)
        return x + self.body(x) * heard


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


class WN(nn.Module):
    """The same in a loop, with both outputs from one convolution, the second of which are summed up (WaveGlow, arXiv:1811.00002)."""

    def __init__(self, channels: int = 8, count: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.enter = nn.ModuleList(conv(channels, 2 * channels, dims=1, dilation=2**i) for i in range(count))
        self.leave = nn.ModuleList(
            nn.Conv1d(channels, channels if i == count - 1 else 2 * channels, 1) for i in range(count)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i, (enter, leave) in enumerate(zip(self.enter, self.leave, strict=True)):
            a, b = enter(x).chunk(2, 1)
            both = leave(torch.tanh(a) * torch.sigmoid(b))
            if i < len(self.leave) - 1:
                x = (x + both[:, : self.channels]) * mask
                total = total + both[:, self.channels :]
            else:
                total = total + both
        return total * mask


@structure(WAVE, MASK, sites={"wn.leave.0": 16, "wn.leave.1": 16})
class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wn, self.head = nn.Conv1d(8, 8, 1), WN(), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.wn(self.stem(x) * mask, mask))
