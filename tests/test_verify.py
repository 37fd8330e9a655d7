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

from se_retrofit import SEAttention
from se_retrofit.models import Base
from se_retrofit.verify import agreement, photographs, prepared_for, redraw_vectors, se_matters


def network(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1))


@pytest.fixture
def images() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_is_equal_even_with_dropout(images: tuple[Tensor], training: bool) -> None:
    net = network(dropout=0.5)
    assert agreement(net, copy.deepcopy(net), images, training=training).equal


@pytest.mark.parametrize("training", [False, True])
def test_one_weight_off_by_one_bit_is_seen(images: tuple[Tensor], training: bool) -> None:
    net = network()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[1].bias[3] = torch.nextafter(other[1].bias[3] + 1, torch.tensor(3.0))
        net[1].bias[3] += 1
    comparison = agreement(net, other, images, training=training)
    assert not comparison.equal
    assert 0 < comparison.difference < 1e-6


class Returning(nn.Module):
    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(x)


def test_an_output_more_or_another_dtype_is_seen(images: tuple[Tensor]) -> None:
    for other in (lambda x: (x, x), lambda x: x.double()):
        assert not agreement(nn.Identity(), Returning(other), images).equal


def test_outputs_in_nested_containers_are_compared(images: tuple[Tensor]) -> None:
    one, other = (Returning(lambda x, n=n: [OrderedDict(out=x, aux=x + n)]) for n in (0, 1))
    assert agreement(one, one, images).values == 2 * images[0].numel()
    assert not agreement(one, other, images).equal


def test_outputs_that_are_not_finite_are_told_apart() -> None:
    assert not agreement(nn.Identity(), nn.Identity(), (torch.tensor([math.nan]),)).finite


def test_networks_modes_and_random_state_are_as_before(images: tuple[Tensor]) -> None:
    net = network(dropout=0.5).train()
    net[2].eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    for training in (False, True):
        agreement(net, net, images, training=training)
    assert [module.training for module in net] == [True, True, False, True]
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_se_that_takes_no_part_is_found_out(images: tuple[Tensor]) -> None:
    idle = network()
    idle[1].se_attention = SEAttention(8, gate="identity")  # there, and never called
    assert se_matters(idle, images).equal
    working = nn.Sequential(network()[0], SEAttention(8, gate="identity"))
    before = copy.deepcopy(working.state_dict())
    assert not se_matters(working, images).equal
    assert all(torch.equal(before[key], value) for key, value in working.state_dict().items())


def test_se_counts_even_where_its_branch_is_zero_as_yet(images: tuple[Tensor]) -> None:
    net = network().append(SEAttention(8, gate="identity"))
    nn.init.zeros_(net[1].weight)
    assert not se_matters(net, images).equal


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


def test_the_photographs_are_real() -> None:
    china, flower = photographs()
    assert china.size == flower.size == (640, 427)
    assert all(len(image.getcolors(maxcolors=2**24)) > 10_000 for image in (china, flower))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("timm/resnet18", [(2, 3, 224, 224)]),
        ("timm/test_resnet", [(2, 3, 160, 160)]),
        ("torchvision/inception_v3", [(2, 3, 299, 299)]),
        ("torchvision/lraspp_mobilenet_v3_large", [(2, 3, 520, 779)]),
        ("torchvision/r3d_18", [(2, 3, 16, 112, 112)]),
        ("torchvision/raft_small", [(1, 3, 424, 640), (1, 3, 424, 640)]),
        ("torchvision/ssdlite320_mobilenet_v3_large", [(3, 427, 640), (3, 427, 640)]),  # in a list
    ],
)
def test_photographs_are_prepared_as_the_model_wants_them(name: str, shapes: list[tuple[int, ...]]) -> None:
    base = Base.of(name)
    # what preparation needs of a model is its configuration alone
    with torch.device("meta"):
        model = base.build()
    inputs = prepared_for(model)
    if isinstance(inputs[0], list):
        (inputs,) = inputs
    assert [tuple(x.shape) for x in inputs] == shapes
    assert all(x.std() > 0.2 for x in inputs)
