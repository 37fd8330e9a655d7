"""Networks for images: restoration, generation, codecs, segmentation, detection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from join_networks import joined
from structure import Unit, conv, structure, unit
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 16, 16)

# A skip over the whole network ----------------------------------------------------------------------------------------


@structure(IMAGE, sites={f"body.{i}": 8 for i in (1, 4, 7, 10)}, kind="chain")
class DnCNN(nn.Module):
    """Predicts the noise of its input (Zhang et al., arXiv:1608.03981)."""

    def __init__(self) -> None:
        super().__init__()
        middle = [m for _ in range(3) for m in (conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())]
        self.body = nn.Sequential(conv(3, 8), nn.ReLU(), *middle, conv(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


@structure(IMAGE, sites={"head": 8, "layers.0": 8, "layers.1": 8, "layers.2": 8}, kind="chain")
class VDSR(nn.Module):
    """An interpolated image and what a chain adds to it (Kim et al., arXiv:1511.04587)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(3, 8), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*(nn.Sequential(conv(8, 8), nn.ReLU(inplace=True)) for _ in range(3)))
        self.tail = conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bicubic")
        return torch.clamp(torch.add(self.tail(self.layers(self.head(x))), x), -9, 9)


@structure(IMAGE, sites={"body.0": 8, "body.1": 8})
class EDSR(nn.Module):
    """Residual units inside of a long skip (Lim et al., arXiv:1707.02921)."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(8, 8), nn.ReLU(True), conv(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            res = self.body(x).mul(0.1)
            res += x
            return res

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = conv(3, 8), nn.Sequential(self.Block(), self.Block(), conv(8, 8))
        self.tail = nn.Sequential(conv(8, 12), nn.PixelShuffle(2), conv(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        res = self.body(x)
        res += x
        return self.tail(res)


@structure(IMAGE, sites={"head": 8, "body.1": 8, "body.3": 8, "body.5": 8, "body": 8}, kind="chain")
class LongSkip(nn.Module):
    """A chain inside of a long skip over features."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Sequential(conv(3, 8), nn.PReLU()), conv(8, 3)
        self.body = nn.Sequential(*(m for _ in range(4) for m in (conv(8, 8), nn.PReLU(8))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


# Modulated norms ------------------------------------------------------------------------------------------------------


class SPADE(nn.Module):
    """A norm whose scale and shift are made of a map (Park et al., arXiv:1903.07291)."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.norm, width = nn.InstanceNorm2d(8), 6 if shared else 3
        self.shared = nn.Sequential(conv(3, 6), nn.ReLU()) if shared else nn.Identity()
        self.gamma, self.beta = conv(width, 8), conv(width, 8)

    def forward(self, x: Tensor, segmentation: Tensor) -> Tensor:
        made = self.shared(F.interpolate(segmentation, size=x.shape[2:], mode="nearest"))
        return self.norm(x) * (1 + self.gamma(made)) + self.beta(made)


class AdaIN(nn.Module):
    """A norm whose scale and shift are made of a style (Karras et al., arXiv:1812.04948)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.InstanceNorm2d(8), nn.Linear(5, 16)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        gamma, beta = self.fc(style)[:, :, None, None].chunk(2, 1)
        return (1 + gamma) * self.norm(x) + beta


class Modulated(nn.Module):
    def __init__(self, norm1: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.conv1, self.conv2 = norm1, norm2, conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.norm1(x, other), 0.2))
        y = self.conv2(F.leaky_relu(self.norm2(y, other), 0.2))
        return (y + x) / 2**0.5


@joined("conv2", IMAGE)
class GauGAN(Modulated):
    def __init__(self) -> None:
        super().__init__(SPADE(True), SPADE(False))


@joined("conv2", torch.randn(2, 5))
class StarGAN(Modulated):
    def __init__(self) -> None:
        super().__init__(AdaIN(), AdaIN())


# Weighed sums ---------------------------------------------------------------------------------------------------------


class SPAB(nn.Module):
    """The branch weighs the sum as well (SPAN, Wan et al., arXiv:2311.12770)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.conv1(x)
        out = self.conv2(F.silu(first))
        weight = torch.sigmoid(out) - 0.5
        return (out + x) * weight, first, weight


@structure(IMAGE, sites={"blocks.0": 8, "blocks.1": 8, "blocks.2": 8}, after="conv2")
class SPAN(nn.Module):
    """The last convolution takes some of the stream's stages, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 8), nn.ModuleList(SPAB() for _ in range(3))
        self.fuse, self.out = nn.Conv2d(24, 8, 1), conv(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        first, _, _ = self.blocks[0](stem)
        second, _, _ = self.blocks[1](first)
        third, tap, _ = self.blocks[2](second)
        return self.out(self.fuse(torch.cat([stem, third, tap], 1)))


# Predictions ----------------------------------------------------------------------------------------------------------


@structure(IMAGE, sites={"stem": 8, "shared": 8}, kind="chain")
class Keypoints(nn.Module):
    """A chain and three heads with a map each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = unit(3, 8), unit(8, 8)
        self.heat, self.offset, self.size = conv(8, 4), conv(8, 2), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.stem(x))
        return torch.cat((self.heat(y), self.offset(y), self.size(y)), dim=1)


class PoseHead(nn.Module):
    """Boxes beside keypoints, whose places are decoded and whose visibility is squashed, in place (Maji et al., arXiv:2204.06806)."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.points = (nn.Sequential(unit(8, 8), nn.Conv2d(8, n, 1)) for n in (4, 6))

    def forward(self, x: Tensor) -> Tensor:
        boxes, points = self.boxes(x).flatten(2), self.points(x).flatten(2).clone()
        boxes = torch.cat([boxes[:, :2] * 8, boxes[:, 2:].exp()], 1)
        points[:, 2::3] = points[:, 2::3].sigmoid()
        points[:, :2] = (points[:, :2] * 2.0 + 0.5) * 8
        return torch.cat([boxes, points], 1)


@structure(IMAGE, sites={"1": 8}, skipped={"2.boxes.0": "plain chain", "2.points.0": "plain chain"})
class Pose(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(unit(3, 8), Unit(), PoseHead())


# Integer codes --------------------------------------------------------------------------------------------------------


@structure(IMAGE, sites={"encoder.1": 8, "decoder.0": 8, "decoder.1": 8})
class VQVAE(nn.Module):
    """A decoder behind codes (van den Oord et al., arXiv:1711.00937), and those decoded again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), Unit())
        self.codes = nn.Embedding(7, 8)
        self.decoder = nn.Sequential(Unit(), Unit(), nn.ConvTranspose2d(8, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x).permute(0, 2, 3, 1)
        codes = torch.cdist(z.flatten(0, 2), self.codes.weight).argmin(-1).view(z.shape[:-1])
        quantised = z + (self.codes(codes) - z).detach()
        return self.decoder(quantised.permute(0, 3, 1, 2))


@structure(torch.randint(0, 7, (2, 4, 4)), sites={"decoder.0": 8, "decoder.1": 8})
class Codes(nn.Module):
    """The decoder alone."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.decoder = nn.Embedding(7, 8), nn.Sequential(Unit(), Unit(), conv(8, 3))

    def forward(self, codes: Tensor) -> Tensor:
        return self.decoder(self.codes(codes).permute(0, 3, 1, 2))
