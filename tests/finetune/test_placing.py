"""What the fine-tune puts on the device, on a CUDA that isn't there: see tests/contract/test_fake_cuda.py."""

from __future__ import annotations

import pytest
import torch
from timm.data import Mixup
from tiny import network
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import TensorDataset

from se_retrofit.finetune import FinetuneConfig
from se_retrofit.finetune.criteria import criterion_of, distillation_loss
from se_retrofit.finetune.data import Batch
from se_retrofit.finetune.engine import placed
from se_retrofit.finetune.evaluation import answer, hits, losses_of
from se_retrofit.finetune.train import mixed

CUDA = torch.device("cuda")
CLASSES = 10


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


def in_mode(mode: FakeTensorMode, module: nn.Module, device: str | torch.device = "cpu") -> nn.Module:
    """The module with fake tensors in place of its own."""
    with mode:
        return module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))


def batch_of(multi_label: bool = False, size: int = 5) -> Batch:
    targets = torch.zeros(size, CLASSES) if multi_label else torch.zeros(size, dtype=torch.long)
    return Batch(torch.randn(size, 3, 32, 32), targets, torch.ones(size, dtype=torch.bool), [])


def places(*tensors: Tensor) -> set[str]:
    return {str(tensor.device) for tensor in tensors}


def test_network_and_images_meet_on_the_device(mode: FakeTensorMode) -> None:
    model = in_mode(mode, network(), CUDA)
    with mode:
        images, targets = placed(batch_of(), CUDA)
        logits = model(images)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert places(images, targets, logits, *model.state_dict().values()) == {"cuda:0"}


LOSSES = [
    {},
    {"label_smoothing": 0.1, "balance": "loss"},
    {"loss": "focal", "balance": "loss"},
    {"loss": "bce"},
    {"loss": "bce", "multi_label": True, "balance": "loss"},
    {"loss": "focal", "multi_label": True},
]


@pytest.mark.parametrize("fields", LOSSES, ids=str)
def test_losses_and_metrics_are_computed_on_the_device(mode: FakeTensorMode, fields: dict[str, object]) -> None:
    config = FinetuneConfig(**fields)  # type: ignore[arg-type]
    multi_label = config.multi_label
    targets = torch.eye(CLASSES) if multi_label else torch.arange(CLASSES)
    data = TensorDataset(torch.zeros(CLASSES, 1), targets)
    criterion = criterion_of(config, None, data, CLASSES)
    if isinstance(criterion, nn.Module):
        criterion = in_mode(mode, criterion, CUDA)
    with mode:
        _, labels = placed(batch_of(multi_label), CUDA)
        logits = torch.randn(len(labels), CLASSES, device=CUDA)
        found = [
            criterion(logits, labels),
            distillation_loss(logits, torch.randn_like(logits), 4.0, multi_label),
            losses_of(logits, labels, multi_label),
            hits(logits, labels, multi_label),
            *answer(logits, labels, multi_label),
        ]
    assert places(*found) == {"cuda:0"}


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_are_mixed_on_the_device(mode: FakeTensorMode, size: int, smoothing: float) -> None:
    mixup = Mixup(0.4, 0.4, label_smoothing=smoothing, num_classes=CLASSES)
    with mode:
        images, labels = mixed(mixup, *placed(batch_of(size=size), CUDA))
        loss = nn.CrossEntropyLoss()(torch.randn(size, CLASSES, device=CUDA), labels)
    assert images.shape == (size, 3, 32, 32)
    assert labels.shape == (size, CLASSES)
    assert places(images, labels, loss) == {"cuda:0"}
