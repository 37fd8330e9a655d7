"""Networks for images: restoration, generation, codecs, segmentation, detection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from structure import Unit, conv, joined, module_of, structure, unit
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 16, 16)

# A skip over the whole network ----------------------------------------------------------------------------------------


@structure(
    IMAGE[:, :, :8, :8],
    parts=lambda: {
        "body": nn.Sequential(*(nn.Sequential(conv(i, 8), nn.ReLU(inplace=True)) for i in (3, 8, 8)), conv(8, 3))
    },
    sites={"body.0": 8, "body.1": 8, "body.2": 8},
    kind="chain",
)
def VDSR(self, x: Tensor) -> Tensor:
    """An interpolated image and what a chain adds to it (Kim et al., arXiv:1511.04587)."""
    x = F.interpolate(x, scale_factor=2, mode="bicubic")
    return torch.clamp(torch.add(self.body(x), x), -9, 9)


@module_of(lambda: {"body": nn.Sequential(conv(8, 8), nn.ReLU(True), conv(8, 8))})
def ResBlock(self, x: Tensor) -> Tensor:
    res = self.body(x).mul(0.1)
    res += x
    return res


def super_resolution() -> dict[str, nn.Module]:
    body = nn.Sequential(ResBlock(), ResBlock(), conv(8, 8))
    return {"head": conv(3, 8), "body": body, "tail": nn.Sequential(conv(8, 12), nn.PixelShuffle(2), conv(3, 3))}


@structure(IMAGE, parts=super_resolution, sites={"body.0": 8, "body.1": 8})
def EDSR(self, x: Tensor) -> Tensor:
    """Residual units inside of a long skip (Lim et al., arXiv:1707.02921)."""
    x = self.head(x)
    res = self.body(x)
    res += x
    return self.tail(res)


def prelu_chain() -> dict[str, nn.Module]:
    body = nn.Sequential(*(m for _ in range(4) for m in (conv(8, 8), nn.PReLU(8))))
    return {"head": nn.Sequential(conv(3, 8), nn.PReLU()), "body": body, "tail": conv(8, 3)}


@structure(IMAGE, parts=prelu_chain, sites={"head": 8, "body.1": 8, "body.3": 8, "body.5": 8, "body": 8}, kind="chain")
def LongSkip(self, x: Tensor) -> Tensor:
    """A chain inside of a long skip over features."""
    x = self.head(x)
    return self.tail(x + self.body(x))


# Modulated norms ------------------------------------------------------------------------------------------------------


@module_of(lambda: {"norm": nn.InstanceNorm2d(8), "gamma": conv(3, 8), "beta": conv(3, 8)})
def SPADE(self, x: Tensor, segmentation: Tensor) -> Tensor:
    """A norm whose scale and shift are made of a map (Park et al., arXiv:1903.07291)."""
    made = F.interpolate(segmentation, size=x.shape[2:], mode="nearest")
    return self.norm(x) * (1 + self.gamma(made)) + self.beta(made)


@module_of(lambda: {"norm": nn.InstanceNorm2d(8), "fc": nn.Linear(5, 16)})
def AdaIN(self, x: Tensor, style: Tensor) -> Tensor:
    """A norm whose scale and shift are made of a style (Karras et al., arXiv:1812.04948)."""
    gamma, beta = self.fc(style)[:, :, None, None].chunk(2, 1)
    return (1 + gamma) * self.norm(x) + beta


def modulated(self: Any, x: Tensor, other: Tensor) -> Tensor:
    y = self.conv1(F.leaky_relu(self.norm1(x, other), 0.2))
    y = self.conv2(F.leaky_relu(self.norm2(y, other), 0.2))
    return (y + x) / 2**0.5


for name, norm, other in (("GauGAN", SPADE, IMAGE), ("StarGAN", AdaIN, torch.randn(2, 5))):
    block = module_of(lambda norm=norm: {"norm1": norm(), "norm2": norm(), "conv1": conv(8, 8), "conv2": conv(8, 8)})
    joined("conv2", other, name=name)(block(modulated))


# Weighed sums ---------------------------------------------------------------------------------------------------------


@module_of(lambda: {"conv1": conv(8, 8), "conv2": conv(8, 8)})
def SPAB(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The branch weighs the sum as well (SPAN, Wan et al., arXiv:2311.12770)."""
    first = self.conv1(x)
    out = self.conv2(F.silu(first))
    weight = torch.sigmoid(out) - 0.5
    return (out + x) * weight, first, weight


def attention_free() -> dict[str, nn.Module]:
    blocks = nn.ModuleList(SPAB() for _ in range(3))
    return {"stem": conv(3, 8), "blocks": blocks, "fuse": nn.Conv2d(24, 8, 1), "out": conv(8, 3)}


@structure(IMAGE, parts=attention_free, sites={"blocks.0": 8, "blocks.1": 8, "blocks.2": 8}, after="conv2")
def SPAN(self, x: Tensor) -> Tensor:
    """The last convolution takes some of the stream's stages, side by side."""
    stem = self.stem(x)
    first, _, _ = self.blocks[0](stem)
    second, _, _ = self.blocks[1](first)
    third, tap, _ = self.blocks[2](second)
    return self.out(self.fuse(torch.cat([stem, third, tap], 1)))


# Predictions ----------------------------------------------------------------------------------------------------------


def heads() -> dict[str, nn.Module]:
    return {"shared": nn.Sequential(unit(3, 8), unit(8, 8)), **{f"head{n}": conv(8, n) for n in (1, 2, 4)}}


@structure(IMAGE, parts=heads, sites={"shared.0": 8, "shared.1": 8}, kind="chain")
def Keypoints(self, x: Tensor) -> Tensor:
    """A chain and three heads with a map each."""
    y = self.shared(x)
    return torch.cat((self.head4(y), self.head2(y), self.head1(y)), dim=1)


@module_of(lambda: {name: nn.Sequential(unit(8, 8), nn.Conv2d(8, n, 1)) for name, n in (("boxes", 4), ("points", 6))})
def PoseHead(self, x: Tensor) -> Tensor:
    """Boxes beside keypoints, whose places are decoded and whose visibility is squashed, in place (Maji et al., arXiv:2204.06806)."""
    boxes, points = self.boxes(x).flatten(2), self.points(x).flatten(2).clone()
    boxes = torch.cat([boxes[:, :2] * 8, boxes[:, 2:].exp()], 1)
    points[:, 2::3] = points[:, 2::3].sigmoid()
    points[:, :2] = (points[:, :2] * 2.0 + 0.5) * 8
    return torch.cat([boxes, points], 1)


@structure(IMAGE, sites={"1": 8}, skipped={"2.boxes.0": "plain chain", "2.points.0": "plain chain"})
def Pose() -> nn.Module:
    return nn.Sequential(unit(3, 8), Unit(), PoseHead())


# Integer codes --------------------------------------------------------------------------------------------------------


def autoencoder() -> dict[str, nn.Module]:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), Unit())
    decoder = nn.Sequential(Unit(), Unit(), nn.ConvTranspose2d(8, 3, 4, 2, 1))
    return {"encoder": encoder, "codes": nn.Embedding(7, 8), "decoder": decoder}


@structure(IMAGE, parts=autoencoder, sites={"encoder.1": 8, "decoder.0": 8, "decoder.1": 8})
def VQVAE(self, x: Tensor) -> Tensor:
    """A decoder behind codes (van den Oord et al., arXiv:1711.00937), and those decoded again."""
    z = self.encoder(x).permute(0, 2, 3, 1)
    codes = torch.cdist(z.flatten(0, 2), self.codes.weight).argmin(-1).view(z.shape[:-1])
    quantised = z + (self.codes(codes) - z).detach()
    return self.decoder(quantised.permute(0, 3, 1, 2))


# U-Nets ---------------------------------------------------------------------------------------------------------------


class SkipConnection(nn.Module):
    """One level of a U-Net around the next (Isola et al., arXiv:1611.07004)."""

    def __init__(self, outer: int, inner: int, *inside: nn.Module) -> None:
        super().__init__()
        down = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1), nn.BatchNorm2d(inner)]
        wide = 2 * inner if inside else inner
        up = [nn.ReLU(), nn.ConvTranspose2d(wide, outer, 4, 2, 1), nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*down, *inside, *up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


@structure(IMAGE, sites={"1.model.0": 8, "1.model.3.model.0": 12, "1.model.3.model.3": 16}, kind="chain")
def Pix2Pix() -> nn.Module:
    """What is convolved and activated in a row gets SE; what is normed and joined with a skip before its activation does not."""
    up = nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()
    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), SkipConnection(8, 12, SkipConnection(12, 16)), *up)


class Level(nn.Module):
    """One level of a U-Net around the next, which is convolved at its own size (Kerfoot et al., arXiv:1812.01087)."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inside(x)], 1)


def down(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def up(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.PReLU())


@structure(
    IMAGE,
    sites={"0": 8, "1.inside.0": 12, "1.inside.1.inside": 16, "1.inside.2": 8},
    kind="chain",
    skipped={"2": "a prediction"},
)
def LevelsOfChains() -> nn.Module:
    """The concat at the lowest level, whose sizes are equal, is a skip like the others, and no dense layer."""
    middle = nn.Sequential(down(8, 12), Level(unit(12, 16)), up(28, 8))
    return nn.Sequential(down(3, 8), Level(middle), nn.ConvTranspose2d(16, 3, 4, 2, 1))


@module_of(lambda: {"conv": conv(2, 2)})
def Logits(self, x: Tensor) -> Tensor:
    return self.conv(x) + x


@structure(IMAGE, sites={"1": 8}, skipped={"3.conv": "a prediction"})
def ResidualLogits() -> nn.Module:
    """The last unit adds a bare convolution to the logits: it predicts, and makes no features."""
    return nn.Sequential(down(3, 8), Unit(), up(8, 2), Logits())


def nested() -> dict[str, nn.Module]:
    widths = {f"{i}{j}": 8 * (j + 1) if i + j else 3 for j in range(4) for i in range(4 - j)}
    return {
        "nodes": nn.ModuleDict({name: unit(width, 8) for name, width in widths.items()}),
        "head": nn.Conv2d(8, 2, 1),
    }


@structure(
    torch.randn(2, 3, 16, 16),
    parts=nested,
    sites={f"nodes.{i}{j}": 8 for j in range(4) for i in range(4 - j)},
    kind="chain",
)
def NestedUNet(self, x: Tensor) -> Tensor:
    """A node takes all before it at its level, as in a dense block, but also the level below (Zhou et al., arXiv:1807.10165)."""
    levels: list[list[Tensor]] = [[], [], [], []]
    for j in range(4):
        for i in range(4 - j):
            if j:
                x = torch.cat(levels[i], 1)
                x = torch.cat([x, F.interpolate(levels[i + 1][j - 1], x.shape[2:])], 1)
            elif i:
                x = F.max_pool2d(levels[i - 1][0], 2)
            levels[i].append(self.nodes[f"{i}{j}"](x))
    return self.head(levels[0][-1])


def pre_activated(*pairs: tuple[int, int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.InstanceNorm2d(i), nn.PReLU(i), conv(i, o)) for i, o in pairs)


@structure(
    IMAGE,
    parts=lambda: {
        "first": conv(3, 8),
        "down": pre_activated((8, 12), (12, 12)),
        "up": pre_activated((24, 12), (20, 5)),
    },
    sites={"se_attention": 8, "down.0": 12, "down.1": 12, "up.0": 12},
    kind="chain",
    skipped={"up.1.2": "no non-linearity"},
)
def DISK(self, x: Tensor) -> tuple[Tensor, Tensor]:
    """Convolutions whose norm and activation come behind pools and joins; the last predicts descriptors and a heatmap, which is
    compared with its neighbours (Tyszkiewicz et al., arXiv:2006.13566)."""
    values = [self.first(x)]
    for layer in self.down:
        values.append(layer(F.avg_pool2d(values[-1], 2)))
    x = values.pop()
    for layer in self.up:
        x = layer(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), values.pop()], 1))
    heat, largest = x[:, 4:], torch.zeros_like(x[:, 4:])
    largest[..., 1:-1, 1:-1] = F.max_pool2d(heat, 3, 1)
    return x[:, :4], heat * (heat == largest)
