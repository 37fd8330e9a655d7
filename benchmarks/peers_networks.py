"""Twenty small networks in the ways in which people write them: for benchmarks/peers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OWN: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {}
PICTURE = (2, 3, 32, 32)


def own(*shapes: tuple[int, ...]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Note a network with the shapes of its inputs."""

    def noted(network: type[nn.Module]) -> type[nn.Module]:
        def build() -> tuple[nn.Module, tuple[Any, ...]]:
            generator = torch.Generator().manual_seed(0)
            return network(), tuple(torch.randn(shape, generator=generator) for shape in shapes or (PICTURE,))

        OWN[network.__name__] = build
        return network

    return noted


def conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Head(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(-1))  # type: ignore[no-any-return]


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, stride), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, stride, size=1) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


@own()
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = conv(3, 16), nn.Sequential(Basic(16, 16), Basic(16, 32, 2), Basic(32, 32))
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.stem(x))))  # type: ignore[no-any-return]


@own()
class InPlaceAdds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.convs = nn.ModuleList(conv(16, 16) for _ in range(3))
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.convs:
            out = layer(x)
            out += x
            x = F.relu(out)
        return self.head(x)  # type: ignore[no-any-return]


@own()
class PreActivation(nn.Module):
    class Unit(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units, self.head = conv(3, 16), nn.ModuleList(self.Unit(16) for _ in range(3)), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
        return self.head(x)  # type: ignore[no-any-return]


@own()
class ShapeDecides(nn.Module):
    """Pads its input to a multiple of 8, and projects a skip only where the shapes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.convs = conv(3, 16), nn.ModuleList([conv(16, 16), conv(16, 32), conv(32, 32)])
        self.project, self.head = nn.Conv2d(16, 32, 1), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 8:
            x = F.pad(x, (0, 8 - x.shape[-1] % 8))
        x = F.relu(self.stem(x))
        for layer in self.convs:
            y = layer(x)
            x = F.relu(y + (self.project(x) if y.shape != x.shape else x))
        return self.head(x)  # type: ignore[no-any-return]


@own()
class ValuesDecide(nn.Module):
    """Looks at its values: a dark image is brightened first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = conv(3, 16), nn.Sequential(Basic(16, 16), Basic(16, 16)), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) < -10:
            x = x + 1
        return self.head(self.layers(F.relu(self.stem(x))))  # type: ignore[no-any-return]


@own()
class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = conv(3, 16), nn.ModuleList(conv(16 + 8 * i, 8) for i in range(4))
        self.head = Head(48)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.relu(self.stem(x))]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return self.head(torch.cat(features, 1))  # type: ignore[no-any-return]


@own()
class Inverted(nn.Module):
    class Unit(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            wide = 4 * inputs
            self.body = nn.Sequential(
                conv(inputs, wide, size=1), nn.ReLU6(), conv(wide, wide, stride, wide), nn.ReLU6(), conv(wide, outputs, size=1)
            )  # fmt: skip
            self.skip = stride == 1 and inputs == outputs

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x) if self.skip else self.body(x)

    def __init__(self) -> None:
        super().__init__()
        units = [self.Unit(8, 8, 1), self.Unit(8, 16, 2), self.Unit(16, 16, 1)]
        self.net = nn.Sequential(conv(3, 8), nn.ReLU6(), *units, Head(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


@own()
class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features, self.head = nn.Sequential(*layers), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


@own()
class Branches(nn.Module):
    class Unit(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.small, self.large, self.pooled = conv(inputs, 8, size=1), conv(inputs, 16), conv(inputs, 8, size=1)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
            return F.relu(torch.cat([self.small(x), self.large(x), pooled], dim=1))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 16), self.Unit(16), self.Unit(32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))))  # type: ignore[no-any-return]


@own()
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = Basic(3, 16), Basic(16, 32, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join, self.out = Basic(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(self.join(torch.cat([skip, self.up(self.bottom(skip))], 1)))  # type: ignore[no-any-return]


@own()
class PlainUNet(nn.Module):
    """As in most repositories: double convolutions, no block with a skip of its own."""

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, outputs), nn.ReLU(True), conv(outputs, outputs), nn.ReLU(True))

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.pool = self.double(3, 8), self.double(8, 16), nn.MaxPool2d(2)
        self.up, self.join, self.out = nn.ConvTranspose2d(16, 8, 2, 2), self.double(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        return self.out(self.join(torch.cat([first, self.up(self.down2(self.pool(first)))], 1)))  # type: ignore[no-any-return]


@own()
class FromConfig(nn.Module):
    def __init__(self, config: str = "16 R16 R16 M R32 R32") -> None:
        super().__init__()
        self.steps, self.blocks, width = config.split(), nn.ModuleDict(), 3
        for i, step in enumerate(self.steps):
            if step != "M":
                outputs = int(step.lstrip("R"))
                self.blocks[str(i)] = Basic(width, outputs) if step[0] == "R" else conv(width, outputs)
                width = outputs
        self.head = Head(width)

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            x = F.max_pool2d(x, 2) if step == "M" else self.blocks[str(i)](x)
        return self.head(x)  # type: ignore[no-any-return]


@own()
class ZippedLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), Head(16)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.gelu(norm(layer(x)))
        return self.head(x)  # type: ignore[no-any-return]


@own()
class LooksInside(nn.Module):
    """Asks its blocks for their widths."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Basic(3, 16), Basic(16, 32, 2)])
        self.scale, self.head = nn.Parameter(torch.ones(1)), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.scale / block.conv2[0].out_channels ** 0.5  # type: ignore[union-attr,index,operator]
        return self.head(x)  # type: ignore[no-any-return]


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


@own()
class GivesDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Basic(3, 16), Basic(16, 32, 2)]), Head(32)

    def forward(self, x: Tensor) -> Output:
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return Output(self.head(x), features)


@own()
class GivesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Sequential(Basic(3, 16), Basic(16, 16)), Head(16), Head(16)

    def forward(self, x: Tensor, **options: Any) -> dict[str, Tensor]:
        x = self.body(x)
        return {"out": self.head(x), **({"aux": self.auxiliary(x)} if options.get("aux", True) else {})}


@own(PICTURE, PICTURE)
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(Basic(3, 16), Basic(16, 16)), Head(16)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.head(self.body(a)) - self.head(self.body(b))).norm(dim=-1)  # type: ignore[no-any-return]


@own((2, 3, 256))
class Signal(nn.Module):
    class Unit(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(width, width, 7, padding=3), nn.BatchNorm1d(width)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.norm(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units, self.head = nn.Conv1d(3, 16, 7), nn.Sequential(self.Unit(16), self.Unit(16)), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)))  # type: ignore[no-any-return]


@own((1, 1, 16, 16, 16))
class Volume(nn.Module):
    class Unit(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv3d(width, width, 3, padding=1), nn.InstanceNorm3d(width, affine=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.leaky_relu(self.norm(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv3d(1, 8, 3, padding=1), nn.Sequential(self.Unit(8), self.Unit(8))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)))  # type: ignore[no-any-return]


@own()
class ChannelsLast(nn.Module):
    class Unit(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
            self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            return x + self.project(F.gelu(self.expand(y))).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 16, 2, 2), nn.Sequential(self.Unit(16), self.Unit(16))
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)))  # type: ignore[no-any-return]
