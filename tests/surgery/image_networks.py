"""Networks for images: restoration, generation, codecs, segmentation, detection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

    def __init__(self, channels: int = 8, shared: bool = True) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.shared = nn.Sequential(conv(3, 6), nn.ReLU()) if shared else nn.Identity()
        self.gamma, self.beta = (conv(6 if shared else 3, channels) for _ in range(2))

    def forward(self, x: Tensor, segmentation: Tensor) -> Tensor:
        made = self.shared(F.interpolate(segmentation, size=x.shape[2:], mode="nearest"))
        return self.norm(x) * (1 + self.gamma(made)) + self.beta(made)


class SPADEUnit(nn.Module):
    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2, self.conv1, self.conv2 = SPADE(8, shared), SPADE(8, shared), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor, segmentation: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.norm1(x, segmentation), 0.2))
        return x + self.conv2(F.leaky_relu(self.norm2(y, segmentation), 0.2))


@structure(IMAGE, sites={"up.0": 8, "up.1": 8})
class GauGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.out = conv(3, 8), nn.ModuleList([SPADEUnit(), SPADEUnit(False)]), conv(8, 3)

    def forward(self, segmentation: Tensor) -> Tensor:
        x = self.stem(F.interpolate(segmentation, scale_factor=0.5))
        for block in self.up:
            x = block(x, segmentation)
        return torch.tanh(self.out(x))


class AdaIN(nn.Module):
    """Karras et al., arXiv:1812.04948."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm, self.fc = nn.InstanceNorm2d(channels), nn.Linear(5, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        gamma, beta = self.fc(style)[:, :, None, None].chunk(2, 1)
        return (1 + gamma) * self.norm(x) + beta


class AdaINUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.conv1, self.conv2 = AdaIN(), AdaIN(), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.norm1(x, style), 0.2))
        y = self.conv2(F.leaky_relu(self.norm2(y, style), 0.2))
        return (y + x) / 2**0.5


@structure(IMAGE, torch.randn(2, 5), sites={"blocks.0": 8, "blocks.1": 8})
class StarGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.out = conv(3, 8), nn.ModuleList([AdaINUnit(), AdaINUnit()]), conv(8, 3)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, style)
        return self.out(x)


class FiLMed(nn.Module):
    """Features whose scale and shift are maps of another input (Perez et al., arXiv:1709.07871)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm, self.film = (
            conv(8, 8, 1),
            conv(8, 8),
            nn.BatchNorm2d(8, affine=False),
            conv(8, 16),
        )

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gamma, beta = self.film(other).chunk(2, 1)
        y = self.norm(self.conv2(x)) * (1 + gamma) + beta
        return x + F.relu(y)


@structure(IMAGE, IMAGE, sites={"blocks.0": 8, "blocks.1": 8})
class FiLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = conv(3, 8), conv(3, 8)
        self.blocks = nn.ModuleList([FiLMed(), FiLMed()])

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, other = self.stem(x), self.other(other)
        for block in self.blocks:
            x = block(x, other)
        return x


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


class YOLOXHead(nn.Module):
    """Boxes, scores and classes side by side, decoded (Ge et al., arXiv:2107.08430)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classes, self.boxes = unit(8, 8, 1), unit(8, 8), unit(8, 8)
        self.cls, self.reg, self.obj = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        c, b = self.classes(x), self.boxes(x)
        return torch.cat([self.reg(b), self.obj(b).sigmoid(), self.cls(c).sigmoid()], 1)


@structure(IMAGE, sites={"backbone.1": 8})
class YOLOX(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(unit(3, 8), Unit()), YOLOXHead()

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.backbone(x)).flatten(2).permute(0, 2, 1)
        return torch.cat([y[..., :2] + 1, y[..., 2:4].exp(), y[..., 4:]], -1)


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
