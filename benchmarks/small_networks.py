"""Small networks of five block kinds, and two data sets that fit a CPU: what folding and quantisation are measured on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import DenseNet, MobileNetV2, shufflenet_v2_x0_5

from se_retrofit import SEAttention, add_se
from se_retrofit.finetune.datasets import digit_images

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-10 (residual)": lambda: timm.create_model("resnet10t", num_classes=10),
    "MobileNetV2 (inverted)": lambda: MobileNetV2(
        10, 0.5, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 1]]
    ),
    "DenseNet, growth 12 (dense)": lambda: DenseNet(12, (3, 3, 3), 24, num_classes=10),
    "ShuffleNetV2 x0.5 (split unit)": lambda: shufflenet_v2_x0_5(num_classes=10),
    "ConvNeXt (residual, LayerNorm)": lambda: ConvNeXt(
        num_classes=10, depths=(1, 1, 2, 1), dims=(32, 48, 96, 128), patch_size=2, ls_init_value=0.1
    ),
}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's handwritten digits in 32x32 pixels: 898 to train on, 899 to test on."""
    images, labels = digit_images(32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(images[part], labels[part]) for part in (order[:898], order[898:]))  # type: ignore[return-value]


def tinted_shapes() -> tuple[TensorDataset, TensorDataset]:
    """Ten kinds of gratings and blobs under light of any colour and strength: 2,000 to train on, 2,000 to test on.

    What tells the classes apart is local, and how strong every channel responds depends on the light of the whole image,
    so gates have something to vary with.
    """
    return _tinted_shapes(2000, seed=0), _tinted_shapes(2000, seed=1)


def _tinted_shapes(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    axis = torch.linspace(-1, 1, 32)
    y, x = (grid.expand(count, -1, -1) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    column = (count, 1, 1)
    # classes 0 to 5: gratings of six directions; 6 to 9: one to four blobs
    angle = (labels.view(column) * torch.pi / 6) + uniform(-0.15, 0.15, *column)
    frequency, phase = uniform(8, 14, *column), uniform(0, 6.28, *column)
    grating = torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)
    blobs = torch.zeros(count, 32, 32)
    for number in range(4):
        left, top, width = uniform(-0.7, 0.7, *column), uniform(-0.7, 0.7, *column), uniform(0.12, 0.2, *column)
        blob = torch.exp(-((x - left) ** 2 + (y - top) ** 2) / (2 * width**2))
        blobs += blob * (labels.view(column) - 6 >= number)
    pattern = torch.where(labels.view(column) < 6, grating, 2 * blobs - 1)
    light = uniform(0.15, 1.0, count, 3, 1, 1) * uniform(0.3, 1.5, count, 1, 1, 1)
    images = light * (1 + 0.5 * pattern[:, None]) + 0.12 * torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(images, labels)


TASKS: dict[str, Callable[[], tuple[TensorDataset, TensorDataset]]] = {
    "digits": digits,
    "tinted shapes": tinted_shapes,
}


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float, seed: int = 0) -> nn.Module:
    """Train in place with AdamW and the learning rate going to zero, SE at five times the rate."""
    torch.manual_seed(seed)
    loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(seed), drop_last=True)
    se = {p for module in model.modules() if isinstance(module, SEAttention) for p in module.parameters()}
    rest = [p for p in model.parameters() if p not in se]
    optimizer = torch.optim.AdamW([{"params": rest}, *([{"params": list(se), "lr": 5 * lr}] if se else [])], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, targets in loader:
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fine_tuned(network: str, data: TensorDataset, epochs: int) -> tuple[nn.Module, nn.Module]:
    """A network trained on the data, then trained on for as long again, once as it is and once with SE."""
    torch.manual_seed(0)
    base = train(NETWORKS[network](), data, epochs, 2e-3)
    plain = train(copy.deepcopy(base), data, epochs, 1e-3, seed=1)
    return plain, train(add_se(base, reduction=4), data, epochs, 1e-3, seed=1)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], data: TensorDataset) -> float:
    """The share of images that are classified correctly."""
    hits = [(model(images).argmax(1) == targets).sum() for images, targets in DataLoader(data, 100)]
    return int(sum(hits)) / len(data)
