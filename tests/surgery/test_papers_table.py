"""The sizes in the paper (Hu et al., arXiv:1709.01507, table 10), in millions of parameters."""

from __future__ import annotations

import pytest
import torch
import torchvision
from sweeps import swept
from torch import nn

from se_retrofit import add_se, plan_se

RATIOS = {2: 45.7, 4: 35.7, 8: 30.7, 16: 28.1, 32: 26.9}


def _resnet50() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet50()


def _millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("reduction", swept([16], [2, 4, 8, 32]))
def test_parameters_of_se_resnet50(reduction: int) -> None:
    """With biases, as in the networks that the authors released: without, r = 8 would give 30.59."""
    model = _resnet50()
    assert _millions(model) == pytest.approx(25.6, abs=0.1)
    assert _millions(add_se(model, reduction, bias=True)) == pytest.approx(RATIOS[reduction], abs=0.1)
    # without biases (2 / r) * sum over stages of N_s * C_s ** 2 (section 4)
    stages = ((3, 256), (4, 512), (6, 1024), (3, 2048))
    assert plan_se(model, reduction).parameters == sum(2 * n * c * c for n, c in stages) // reduction


def test_se_inside_the_branch_costs_less_as_in_the_papers_table_14() -> None:
    assert _millions(add_se(_resnet50(), 16, placement="3x3")) == pytest.approx(25.8, abs=0.1)
