"""Small networks of many fields, written as their authors write them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, *, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.SiLU()] if act else []))


class Basic(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.a, self.b = unit(channels, channels), unit(channels, channels, act=False)

    def forward(self, x):
        return F.relu(self.b(self.a(x)) + x)


class C2f(nn.Module):
    """Of YOLOv8, without shortcuts: two halves, and what convolutions make of the second."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.cv1, self.cv2 = unit(8, 8, 1), unit((2 + count) * 4, 8, 1)
        self.m = nn.ModuleList(nn.Sequential(unit(4, 4), unit(4, 4)) for _ in range(count))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Aggregated(nn.Module):
    """One-shot aggregation without the input, collected in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fuse = unit(8, 4), unit(4, 4), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        outs = []
        for layer in (self.a, self.b):
            x = layer(x)
            outs.append(x)
        return self.fuse(torch.cat(outs, 1))


class SplitLater(nn.Module):
    """A split unit whose input is changed before it is split."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        size = math.ceil(x.shape[-1] / 4)
        x = x + F.interpolate(F.adaptive_avg_pool2d(x, size), size=x.shape[-2:])
        a, b = x.chunk(2, 1)
        out = F.relu(self.narrow(b))
        return torch.cat([a, out], 1)


class Frames(nn.Module):
    """Residual units over frames that are folded into the batch; a mean over frames pools no space."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Basic()

    def forward(self, x):
        b, c, h, w = x.shape
        y = x.view(b, 1, c, h, w).expand(b, 2, c, h, w).reshape(b * 2, c, h, w)
        return self.unit(y).view(b, 2, c, h, w).mean(1)


class Padded(nn.Module):
    """MobileNetV2 with TensorFlow's padding before each convolution, that of the projection too."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = (
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 8, 1),
        )

    @staticmethod
    def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return conv(F.pad(x, pads))

    def forward(self, x):
        skip = x
        x = F.relu6(self.same(x, self.expand))
        x = F.relu6(self.same(x, self.depthwise))
        return skip + self.same(x, self.project)


class Ghost(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, act: bool = True) -> None:
        super().__init__()
        self.primary = unit(inputs, outputs // 2, 1, act=act)
        self.cheap = unit(outputs // 2, outputs // 2, groups=outputs // 2, act=act)

    def forward(self, x):
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)


class GhostBottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = Ghost(8, 16), Ghost(16, 8, act=False)

    def forward(self, x):
        return self.ghost2(self.ghost1(x)) + x


class Res2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = unit(8, 16, 1), unit(16, 8, 1, act=False)
        self.convs = nn.ModuleList(unit(4, 4) for _ in range(3))

    def forward(self, x):
        pieces = torch.split(self.first(x), 4, 1)
        piece, done = 0, []
        for i, conv in enumerate(self.convs):
            piece = conv(piece + pieces[i])
            done.append(piece)
        out = self.last(torch.cat((*done, pieces[-1]), 1))
        out += x
        return F.relu(out)


class Shifted(nn.Module):
    """A temporal shift: parts of the map are written into another."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = unit(8, 8)

    def forward(self, x):
        out = torch.zeros_like(x)
        out[:, :2] = x.roll(1, 0)[:, :2]
        out[:, 2:] = x[:, 2:]
        return x + self.unit(out)


class Perceptual(nn.Module):
    """All activations are outputs; SE is behind those that the network goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(layer for i in (3, 8, 8) for layer in (nn.Conv2d(i, 8, 3, padding=1), nn.ReLU()))
        )

    def forward(self, x, layers=(1, 3, 5)):
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in layers:
                found.append(x)
        return found


class Reader(nn.Module):
    """A recurrent network reads what convolutions have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(unit(3, 8), nn.MaxPool2d(2), unit(8, 8))
        self.lstm, self.head = nn.LSTM(8, 4, bidirectional=True, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.lstm(self.convs(x).mean(2).transpose(1, 2))[0])


class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.gates = nn.Conv2d(3, 8, 3, padding=1), Basic(), nn.Conv2d(16, 32, 3, padding=1)

    def forward(self, x):
        h = c = torch.zeros_like(self.stem(x))
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([self.unit(self.stem(x)), h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


class Quantised(nn.Module):
    """VQ-VAE: a codebook whose use is counted, and a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Basic())
        self.decoder = nn.Sequential(Basic(), nn.Conv2d(8, 3, 1))
        self.codes = nn.Embedding(6, 8)
        self.register_buffer("used", torch.zeros(6))

    def forward(self, x):
        z = self.encoder(x)
        i = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 8), self.codes.weight).argmin(1)
        if self.training:
            self.used.add_(torch.bincount(i, minlength=6))
        q = self.codes(i).view(z.shape[0], *z.shape[2:], 8).permute(0, 3, 1, 2)
        return self.decoder(z + (q - z).detach()), i


class Detector(nn.Module):
    """Heads at two strides; anchors are cached by the shape of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(unit(3, 8), Basic()), nn.Sequential(nn.MaxPool2d(2), Basic())])
        self.heads = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))
        self.anchors: Any = None
        self.shape: Any = None

    def forward(self, x):
        maps = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            maps.append(head(x))
        if self.training:
            return maps
        if self.shape != maps[0].shape:
            self.anchors = torch.cat([torch.arange(m[0, 0].numel()).float() for m in maps])
            self.shape = maps[0].shape
        return torch.cat([m.flatten(2) for m in maps], 2) * self.anchors, maps


class Mover(nn.Module):
    """Two blocks that keep copies of themselves in the memo, as the documentation of ``copy`` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = unit(8, 8)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        memo[id(self)] = new = type(self)()
        new.load_state_dict(self.state_dict())
        return new.train(self.training)

    def forward(self, x):
        return x + self.unit(x)


class SetForward(nn.Module):
    """A function that was made in ``__init__`` holds the module's children."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.run = lambda x: self.norm(self.conv(x))

    def forward(self, x):
        return x + F.relu(self.run(x))


class Modulated(nn.Module):
    """StyleGAN2's convolution: a kernel for each image, the batch folded into the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, 8, 8, 3, 3)), nn.Linear(4, 8)

    def forward(self, x, style):
        b, c, h, w = x.shape
        kernel = self.weight * self.style(style).view(b, 1, c, 1, 1)
        kernel = kernel * torch.rsqrt(kernel.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        return F.conv2d(x.reshape(1, b * c, h, w), kernel.view(b * c, c, 3, 3), padding=1, groups=b).view(b, c, h, w)


class Styled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = Modulated(), Modulated()
        self.style = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        style = self.style.expand(x.shape[0], -1)
        out = F.leaky_relu(self.conv1(x, style), 0.2)
        return (x + self.conv2(out, style)) / math.sqrt(2)
