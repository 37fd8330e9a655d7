"""A network and data small enough to be trained in a test, and in the processes that tests start."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.utils.data import Subset

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, FinetuneResult, NamedData, finetune, load_data

IMAGES, VALIDATED, BATCH = 128, 50, 16  # eight updates an epoch


def network(se: bool = True, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A residual network of 4 blocks, with norms that are not at their first values."""
    return copy.deepcopy(made(se, seed, **kwargs))


@functools.cache
def made(se: bool, seed: int, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(
            BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=10, zero_init_last=False, **kwargs
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        return add_se(model) if se else model


def classifier(inputs: int, outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


def tiny_data(train: int = IMAGES, val: int = VALIDATED) -> NamedData:
    data = load_data("digits", image_size=16)
    return NamedData(Subset(data.train, range(train)), Subset(data.val, range(val)), 10)


def config(**changes: Any) -> FinetuneConfig:
    fields = {"epochs": 1, "batch_size": BATCH, "lr": 1e-3, "workers": 0, "log_every": 1, "cpu": True}
    return FinetuneConfig(**{**fields, **changes})


def trained(
    model: nn.Module, data: Any, val: Any = None, recipe: dict[str, Any] | None = None, **options: Any
) -> FinetuneResult:
    """A quiet fine-tune on the training and validation images of ``data``, or on other data, by a recipe of these fields."""
    train, val = (data.train, data.val) if isinstance(data, NamedData) else (data, val)
    return finetune(model, train, val, config=config(**(recipe or {})), **{"quiet": True, **options})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
