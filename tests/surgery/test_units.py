"""In plain chains, what is named and asked for is the unit that a network is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, has_se, plan_of, plan_se, remove_se

EXAMPLE = torch.empty(1, 3, 32, 32)


def convs(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return layers


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*convs(inputs, outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.u1 = DoubleConv(3, 8), DoubleConv(8, 16), DoubleConv(16, 8)
        self.pool, self.up, self.head = nn.MaxPool2d(2), nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.d1(x)
        return self.head(self.u1(torch.cat([first, self.up(self.d2(self.pool(first)))], 1)))


def stages() -> nn.Module:
    """A VGG whose stages are sequences, with the pools at their ends or between them."""
    parts = [nn.Sequential(*convs(3, 8, 8), nn.MaxPool2d(2)), nn.Sequential(*convs(8, 16, 16, 16)), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(10))


class Streams(nn.Module):
    """Two networks side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(*convs(3, 8), nn.MaxPool2d(2), *convs(8, 16)) for _ in range(2))
        self.tail = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.a(x) * self.b(x))


class Body(nn.Module):
    """A network for denoising, whose one body is nearly all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = nn.Sequential(*convs(3, 8, 8, 8, 8)), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    model.eval()(torch.zeros(EXAMPLE.shape))
    return model


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (UNet, ["d1.net"] * 2 + ["d2.net"] * 2 + ["u1.net"] * 2),
        (stages, ["0"] * 2 + ["1"] * 3),
        # where there is no other such unit, each convolution is on its own
        (Body, ["body.0", "body.3", "body.6", "body.9"]),
        # and where their size changes
        (Streams, ["a.0", "a.4", "b.0", "b.4"]),
        (lambda: torchvision.models.vgg11(num_classes=10), [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)]),
    ],
    ids=["u-net", "stages", "body", "streams", "vgg"],
)
def test_convolutions_of_a_repeated_unit_are_named_after_it(make: Callable[[], nn.Module], blocks: list[str]) -> None:
    assert [site.block for site in plan_se(built(make), example_inputs=EXAMPLE).sites] == blocks


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"include": "d1.net"}, ["d1.net.2", "d1.net"]),
        ({"exclude": ["d?.*"]}, ["u1.net.2", "u1.net"]),
        ({"at": "d1.net.2"}, ["d1.net.2"]),  # one convolution of a unit
    ],
)
def test_a_unit_is_asked_for_by_its_path(options: dict[str, list[str] | str], paths: list[str]) -> None:
    plan = plan_se(UNet(), example_inputs=EXAMPLE, **options)  # type: ignore[arg-type]
    assert [site.path for site in plan.sites] == [f"{path}.se_attention" for path in paths]
    assert {skip.block for skip in plan.skipped}.isdisjoint(site.block for site in plan.sites)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        RetrofitError, match=r"the pattern 'd9\.\*' matches none of the 3 blocks found, which are d1\.net"
    ):
        plan_se(UNet(), example_inputs=EXAMPLE, include="d9.*")


def test_a_site_of_a_unit_may_be_taken_out_of_a_plan() -> None:
    model = UNet()
    plan = plan_se(model, example_inputs=EXAMPLE)
    fewer = replace(plan, sites=plan.sites[1:])
    retrofitted = add_se(model, plan=fewer)
    assert [site.path for site in plan_of(retrofitted).sites] == [site.path for site in plan.sites[1:]]
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(retrofitted.eval()(x), model.eval()(x))
    # and the plan that it has now is one by which it can be retrofitted again
    again = add_se(remove_se(retrofitted), plan=plan_of(retrofitted))
    assert has_se(again)
    assert list(again.state_dict()) == list(retrofitted.state_dict())
