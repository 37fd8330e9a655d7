"""A network and data small enough to be trained in a test, and in the processes that tests start."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.utils.data import Subset

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, NamedData, load_data


def network(se: bool = True, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A residual network of 4 blocks, with norms that are not at their first values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(
            BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=10, zero_init_last=False, **kwargs
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        return add_se(model) if se else model


def tiny_data(train: int = 256, val: int = 100) -> NamedData:
    data = load_data("digits", image_size=16)
    return NamedData(Subset(data.train, range(train)), Subset(data.val, range(val)), 10)


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        **{"epochs": 2, "batch_size": 32, "lr": 1e-3, "workers": 0, "log_every": 1, "cpu": True, **changes}
    )


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
