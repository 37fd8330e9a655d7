"""Blocks of many fields, each written as its authors write it, and the ways in which their branch joins what bypassed it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from structure import Branch, Net, Unit, conv, joined, module_of, structure, unit
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

IMAGE = torch.randn(2, 3, 12, 12)
WAVE = torch.randn(2, 8, 40)

# Concatenations -------------------------------------------------------------------------------------------------------


def halves() -> dict[str, nn.Module]:
    return {"cv1": unit(8, 8, 1), "cv2": unit(12, 8, 1), "m": nn.ModuleList([unit(4, 4)])}


@joined("cv2", parts=halves, kind="multi-branch")
def C2f(self, x: Tensor) -> Tensor:
    """Of YOLOv8, without shortcuts: two halves, and what convolutions make of the second."""
    y = list(self.cv1(x).chunk(2, 1))
    y.extend(m(y[-1]) for m in self.m)
    return self.cv2(torch.cat(y, 1))


@joined("", parts=lambda: {"narrow": conv(4, 4)}, kind="dense", channels=4)
def SplitLater(self, x: Tensor) -> Tensor:
    """A split unit whose input is changed before it is split."""
    size = math.ceil(x.shape[-1] / 4)
    x = x + F.interpolate(F.adaptive_avg_pool2d(x, size), size=x.shape[-2:])
    a, b = x.chunk(2, 1)
    return torch.cat([a, F.relu(self.narrow(b))], 1)


@module_of(lambda inputs: {"conv1": conv(inputs, 8), "conv2": nn.Conv2d(8, 12, 1)})
def DualPathBlock(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A block of a dual path network as its authors wrote it: it returns the residual and the dense path side by side."""
    whole = torch.cat(x, 1) if isinstance(x, tuple) else x
    y = self.conv2(F.relu(self.conv1(whole)))
    residual, dense = x if isinstance(x, tuple) else (x[:, :8], x[:, 8:])
    return residual + y[:, :8], torch.cat([dense, y[:, 8:]], 1)


@structure(
    IMAGE,
    parts=lambda: {"stem": conv(3, 12), "blocks": nn.Sequential(DualPathBlock(12), DualPathBlock(16))},
    sites={"blocks.0": 12, "blocks.1": 12},
    kind="dense",
    after="conv2",
)
def DualPath(self, x: Tensor) -> Tensor:
    """SE is on what goes into both paths."""
    return torch.cat(self.blocks(F.relu(self.stem(x))), 1)


# Sums -----------------------------------------------------------------------------------------------------------------


@structure(IMAGE, parts=lambda: {"stem": conv(3, 8), "unit": Unit()}, sites={"unit": 8})
def Frames(self, x: Tensor) -> Tensor:
    """Residual units over frames that are folded into the batch; a mean over frames pools no space."""
    b, _, h, w = x.shape
    y = self.stem(x)[:, None].expand(b, 2, 8, h, w).reshape(b * 2, 8, h, w)
    return self.unit(y).view(b, 2, 8, h, w).mean(1)


def convnext() -> dict[str, nn.Module | nn.Parameter]:
    layers = {"conv": conv(8, 8, 7, groups=8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}
    return {"norm": nn.LayerNorm(8), "gamma": nn.Parameter(torch.ones(8)), **layers}


@joined("down", parts=convnext)
def ScaledBeforePermuting(self, x: Tensor) -> Tensor:
    """The layer scale of the original ConvNeXt: before the permutation back. SE stands before it."""
    y = self.norm(self.conv(x).permute(0, 2, 3, 1))
    y = self.gamma * self.down(F.gelu(self.up(y)))
    return x + y.permute(0, 3, 1, 2)


def unpadded() -> dict[str, nn.Module]:
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    return {"expand": nn.Conv2d(8, 16, 1), "depthwise": depthwise, "project": nn.Conv2d(16, 8, 1)}


@joined("", parts=unpadded, kind="inverted", channels=16)
def Padded(self, x: Tensor) -> Tensor:
    """MobileNetV2 with a padding of its own before each convolution, that of the projection too."""
    y = F.relu6(self.expand(F.pad(x, [0, 0, 0, 0])))
    y = F.relu6(self.depthwise(F.pad(y, [1, 1, 1, 1])))
    return x + self.project(F.pad(y, [0, 0, 0, 0]))


@module_of(lambda: {"weight": nn.Parameter(torch.randn(1, 8, 8, 3, 3)), "style": nn.Linear(4, 8)})
def Modulated(self, x: Tensor, style: Tensor) -> Tensor:
    """StyleGAN2's convolution: a kernel for each image, the batch folded into the channels."""
    b, c, h, w = x.shape
    kernel = self.weight * self.style(style).view(b, 1, c, 1, 1)
    kernel = kernel * torch.rsqrt(kernel.square().sum([2, 3, 4], keepdim=True) + 1e-8)
    return F.conv2d(x.reshape(1, b * c, h, w), kernel.view(b * c, c, 3, 3), padding=1, groups=b).view(b, c, h, w)


@joined(parts=lambda: {"conv1": Modulated(), "conv2": Modulated(), "style": nn.Parameter(torch.randn(1, 4))})
def Styled(self, x: Tensor) -> Tensor:
    style = self.style.expand(x.shape[0], -1)
    out = F.leaky_relu(self.conv1(x, style), 0.2)
    return (x + self.conv2(out, style)) / math.sqrt(2)


# Gates that are no channel attention ----------------------------------------------------------------------------------


def experts() -> dict[str, nn.Module]:
    layers = nn.ModuleList(conv(8, 8) for _ in range(3))
    return {"experts": layers, "route": nn.Linear(8, 3), "norm": nn.BatchNorm2d(8)}


@joined("", parts=experts)
def Experts(self, x: Tensor) -> Tensor:
    """A soft mixture: the routing weighs whole branches, not channels."""
    weights = self.route(x.mean((2, 3))).softmax(1)
    out = sum(weights[:, i, None, None, None] * expert(x) for i, expert in enumerate(self.experts))
    return x + F.relu(self.norm(out))


# Networks -------------------------------------------------------------------------------------------------------------


def embedded() -> dict[str, nn.Module]:
    norms = {f"norm{i}": nn.GroupNorm(2, 8) for i in (1, 2)}
    return {**norms, "conv1": conv(8, 8), "conv2": conv(8, 8), "embed": nn.Linear(6, 8)}


@joined("conv2", torch.rand(2, 6), parts=embedded)
def Embedded(self, x: Tensor, t: Tensor) -> Tensor:
    """Of a diffusion U-Net: a timestep's embedding is added inside, the input at the end, before which SE stands."""
    h = self.conv1(F.silu(self.norm1(x)))
    h = h + self.embed(F.silu(t))[:, :, None, None]
    h = self.conv2(F.silu(self.norm2(h)))
    return x + h


@structure(
    IMAGE,
    parts=lambda: {"stem": conv(3, 8), "unit": Unit(), "extra": Unit(), "fc": nn.Linear(8, 2)},
    sites={"unit": 8},
    skipped={"extra.conv1": "train mode alone", "extra.conv2": "train mode alone"},
)
def OfTraining(self, x: Tensor) -> Tensor:
    """A unit that runs in train mode alone gets no SE, and is listed."""
    x = self.unit(self.stem(x))
    if self.training:
        x = self.extra(x)
    return self.fc(x.mean((2, 3)))


@structure(IMAGE, parts=lambda: {"stem": conv(3, 8), "unit": Unit(), "gates": conv(16, 32)}, sites={"unit": 8})
def ConvLSTM(self, x: Tensor) -> Tensor:
    h = c = torch.zeros_like(self.stem(x))
    for _ in range(2):
        i, f, o, g = self.gates(torch.cat([self.unit(self.stem(x)), h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


# Joins ------------------------------------------------------------------------------------------------------------------


@joined()
def Permuted(self, x: Tensor) -> Tensor:
    """A convolution without an activation beside the input, both moved to another layout."""
    return (x.permute(0, 2, 3, 1) + self.conv2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Joins in a helper ----------------------------------------------------------------------------------------------------


@module_of(dict)
def Add(self, x: Tensor, y: Tensor) -> Tensor:
    return x + y


@module_of(dict)
def MPAdd(self, x: Tensor, y: Tensor) -> Tensor:
    """Keeps the magnitude (Karras et al., arXiv:2312.02696)."""
    return x.lerp(y, 0.3) / (0.7**2 + 0.3**2) ** 0.5


@module_of(lambda: {"scale": nn.Parameter(torch.rand(8, 1, 1) + 0.5)})
def ScaledAdd(self, x: Tensor, y: Tensor) -> Tensor:
    return x + self.scale * y


def called(self: Any, x: Tensor) -> Tensor:
    return self.add(x, self.branch(x))


def of_float_functional(self: Any, x: Tensor) -> Tensor:
    return self.add.add(x, self.branch(x))


for helper in (Add, MPAdd, ScaledAdd, FloatFunctional):
    block = module_of(lambda helper=helper: {"add": helper()}, Branch)
    joined(name=f"With{helper.__name__}")(block(of_float_functional if helper is FloatFunctional else called))


# Joins that are no plain add ------------------------------------------------------------------------------------------


@joined()
def Subtracted(self, x: Tensor) -> Tensor:
    """A branch that is what to take away, as in denoising."""
    return x - self.branch(x)


@joined()
def LerpByChannel(self, x: Tensor) -> Tensor:
    """Taken apart on meta: x + t * (y - x)."""
    return torch.lerp(x, self.branch(x), self.scale)


@joined()
def AddCMul(self, x: Tensor) -> Tensor:
    """ViT's and ConvNeXt's layer scale in one call."""
    return torch.addcmul(x, self.scale, self.branch(x))


@joined()
def Where(self, x: Tensor) -> Tensor:
    """Stochastic depth for each image."""
    keep = torch.ones(len(x), 1, 1, 1, dtype=torch.bool)
    return torch.where(keep, x + self.branch(x), x)


@joined()
def MaskedFill(self, x: Tensor) -> Tensor:
    return x + self.branch(x).masked_fill(x.new_ones(x.shape[-1]) < 0, 0)


@joined("conv1")
def SumOfOne(self, x: Tensor) -> Tensor:
    """A convolution beside its input: a residual unit, no sum to be fused."""
    return F.relu(sum([x, self.conv1(x)]))


@joined()
def Stacked(self, x: Tensor) -> Tensor:
    return torch.stack([x, self.branch(x)]).sum(0)


@joined("body", parts=lambda: {"body": nn.Sequential(nn.ReLU(inplace=True), conv(8, 8), nn.BatchNorm2d(8))})
def ReLUFirst(self, x: Tensor) -> Tensor:
    """The branch's first activation overwrites the input, and so the skip."""
    return torch.add(x, self.body(x))


# Streams ------------------------------------------------------------------------------------------------------------


@structure(
    WAVE,
    parts=lambda: {"layers": nn.ModuleList(nn.Sequential(*unit(8, 8, dims=1), conv(8, 8, dims=1)) for _ in range(3))},
    sites={f"layers.{i}": 8 for i in range(3)},
)
def Summed(self, x: Tensor) -> Tensor:
    """A stream whose stages are summed up as well."""
    total = 0
    for layer in self.layers:
        x = x + layer(x)
        total = total + x
    return total


# Couplings ------------------------------------------------------------------------------------------------------------


@module_of(lambda: {name: nn.Sequential(*unit(4, 4), conv(4, 4)) for name in "fg"})
def Reversible(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gomez et al., arXiv:1707.04585."""
    x1, x2 = x
    y1 = x1 + self.f(x2)
    return y1, x2 + self.g(y1)


@structure(IMAGE, sites={f"block{i}{end}": 4 for i in (1, 2) for end in ("", ".se_attention_2")})
class RevNet(Net):
    def __init__(self) -> None:
        super().__init__(Reversible)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.block2(self.block1(self.stem(x).chunk(2, 1))), 1)


# Two outputs ----------------------------------------------------------------------------------------------------------


@module_of(dict, Branch)
def Carrying(self, given: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Hands on its output with all that came before it."""
    x, seen = given
    x = F.relu(x + self.branch(x))
    return x, [*seen, x]


@structure(
    IMAGE,
    parts=lambda: {"stem": conv(3, 8), "blocks": nn.Sequential(Carrying(), Carrying(), Carrying())},
    sites={"blocks.0": 8, "blocks.1": 8, "blocks.2": 8},
)
def Stack(self, x: Tensor) -> Tensor:
    """A sequence of blocks that hand on a list."""
    x, seen = self.blocks((self.stem(x), []))
    return torch.cat([x, *seen], 1)
