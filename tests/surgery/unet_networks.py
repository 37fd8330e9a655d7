"""U-Nets, whose decoders take what their encoders have made beside what comes from below."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from structure import conv, structure
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 16, 16)


class SkipConnection(nn.Module):
    """One level of a U-Net around the next (Isola et al., arXiv:1611.07004)."""

    def __init__(self, outer: int, inner: int, inside: nn.Module | None = None) -> None:
        super().__init__()
        down = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1), nn.BatchNorm2d(inner)]
        wide = inner if inside is None else 2 * inner
        up = [nn.ReLU(), nn.ConvTranspose2d(wide, outer, 4, 2, 1), nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*down, *([] if inside is None else [inside]), *up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


@structure(IMAGE, sites={"inside.model.0": 8, "inside.model.3.model.0": 12, "inside.model.3.model.3": 16}, kind="chain")
class Pix2Pix(nn.Module):
    """What is convolved and activated in a row gets SE; what is normed and joined with a skip before its activation does not."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inside = nn.Conv2d(3, 8, 4, 2, 1), SkipConnection(8, 12, SkipConnection(12, 16))
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.inside(self.down(x)))


class PreActivated(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.InstanceNorm2d(inputs), nn.PReLU(inputs), conv(inputs, outputs))


@structure(
    IMAGE,
    sites={"se_attention": 8, "down.0": 12, "down.1": 12, "up.0": 12},
    kind="chain",
    skipped={"up.1.2": "no non-linearity"},
)
class DISK(nn.Module):
    """Convolutions whose norm and activation come behind pools and joins; the last predicts descriptors and a heatmap, which is
    compared with its neighbours (Tyszkiewicz et al., arXiv:2006.13566)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = conv(3, 8), nn.ModuleList([PreActivated(8, 12), PreActivated(12, 12)])
        self.up = nn.ModuleList([PreActivated(24, 12), PreActivated(20, 5)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [self.first(x)]
        for layer in self.down:
            values.append(layer(F.avg_pool2d(values[-1], 2)))
        x = values.pop()
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), values.pop()], 1))
        heat, largest = x[:, 4:], torch.zeros_like(x[:, 4:])
        largest[..., 1:-1, 1:-1] = F.max_pool2d(heat, 3, 1)
        return x[:, :4], heat * (heat == largest)


class Double(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2, self.relu = conv(outputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


@structure(
    IMAGE,
    sites={
        f"conv{n}{e}": (4, 8, 12)[int(n[0])]
        for n in ("0_0", "1_0", "2_0", "0_1", "1_1", "0_2")
        for e in ("", ".se_attention_2")
    },
    kind="chain",
)
class NestedUNet(nn.Module):
    """Zhou et al., arXiv:1807.10165."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 8, 12)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv0_0, self.conv1_0, self.conv2_0 = Double(3, 4), Double(4, 8), Double(8, 12)
        self.conv0_1, self.conv1_1 = Double(4 + 8, 4), Double(8 + 12, 8)
        self.conv0_2, self.final = Double(2 * 4 + 8, 4), nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x0_0 = self.conv0_0(x)
        x1_0 = self.conv1_0(self.pool(x0_0))
        x0_1 = self.conv0_1(torch.cat([x0_0, self.up(x1_0)], 1))
        x2_0 = self.conv2_0(self.pool(x1_0))
        x1_1 = self.conv1_1(torch.cat([x1_0, self.up(x2_0)], 1))
        x0_2 = self.conv0_2(torch.cat([x0_0, x0_1, self.up(x1_1)], 1))
        return self.final(x0_2)
