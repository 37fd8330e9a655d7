"""The check that ``add`` and the demo rest on: it must see a difference where there is one."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_retrofit import SEAttention
from se_retrofit.surgery.record.inputs import Inputs
from se_retrofit.verify import agreement, redraw_vectors, se_matters


def network(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1))


IMAGES = Inputs((torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


class Returning(nn.Module):
    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(x)


def nested(added: int) -> nn.Module:
    return Returning(lambda x: [OrderedDict(out=x, aux=x + added)])


@pytest.mark.parametrize("training", [False, True])
def test_one_weight_off_by_one_bit_is_seen_and_dropout_is_no_difference(training: bool) -> None:
    net = network(dropout=0.5)
    with torch.no_grad():
        net[1].bias[3] += 1
    other = copy.deepcopy(net)
    assert agreement(net, other, IMAGES, training=training).equal
    with torch.no_grad():
        other[1].bias[3] = torch.nextafter(net[1].bias[3], torch.tensor(3.0))
    comparison = agreement(net, other, IMAGES, training=training)
    assert not comparison.equal
    assert 0 < comparison.difference < 1e-6


def test_a_gpus_random_numbers_are_no_difference_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator stands for that of the GPU, from which dropout draws there."""
    gpu = torch.Generator().manual_seed(1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [gpu.get_state()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: gpu.set_state(states[0]))
    before, drawing = gpu.get_state(), Returning(lambda x: x * torch.rand(x.shape, generator=gpu))
    assert agreement(drawing, drawing, IMAGES).equal
    assert torch.equal(gpu.get_state(), before)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Identity(), Returning(lambda x: (x, x))),
        (nn.Identity(), Returning(lambda x: x.double())),
        (nested(0), nested(1)),
    ],
    ids=["an output more", "another dtype", "a value in a container"],
)
def test_outputs_of_any_kind_are_compared(first: nn.Module, second: nn.Module) -> None:
    assert not agreement(first, second, IMAGES).equal
    assert agreement(second, second, IMAGES).equal
    assert agreement(second, second, IMAGES).values == IMAGES.args[0].numel() * len(tree_leaves(second(*IMAGES.args)))


def test_outputs_that_are_not_finite_are_told_apart() -> None:
    assert not agreement(nn.Identity(), nn.Identity(), Inputs((torch.tensor([math.nan]),))).finite


def test_networks_modes_and_random_state_are_as_before() -> None:
    net = network(dropout=0.5).train()
    net[2].eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    for training in (False, True):
        agreement(net, net, IMAGES, training=training)
    assert [module.training for module in net] == [True, True, False, True]
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_se_that_takes_no_part_is_found_out_and_a_branch_that_is_zero_as_yet_hides_none() -> None:
    idle = network()
    idle[1].se_attention = SEAttention(8, gate="identity")  # there, and never called
    assert se_matters(idle, IMAGES).equal
    working = network().append(SEAttention(8, gate="identity"))
    nn.init.zeros_(working[1].weight)
    before = copy.deepcopy(working.state_dict())
    assert not se_matters(working, IMAGES).equal
    assert all(torch.equal(before[key], value) for key, value in working.state_dict().items())


def test_redrawing_leaves_no_norm_at_its_defaults() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    nn.init.zeros_(net[1].weight)
    kernel = net[0].weight.clone()
    redraw_vectors(net)
    for norm in net[1:]:
        assert ((norm.weight > 0.4) & (norm.weight < 1.6) & (norm.weight != 1)).all()
        assert (norm.bias != 0).all()
    assert (net[1].running_mean != 0).all()
    assert (net[1].running_var > 0.4).all()
    assert net[1].num_batches_tracked == 0
    assert torch.equal(kernel, net[0].weight)
