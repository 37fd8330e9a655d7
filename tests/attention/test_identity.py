"""Every attention starts as an exact identity, wherever it is put into a network, and learns from the first step on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attentions import (
    ALL,
    BUILT_IN,
    EVERY_TIME,
    FACTORIES,
    IN_SWEEPS,
    LIBRARIES,
    MORE_OF_LIBRARIES,
    Network,
    citizen,
    inputs,
    inserted,
    original,
    retrofitted,
)
from networks import run, same_tensors
from numeric import assert_same_behaviour
from sweeps import swept
from torch import nn

EVERYWHERE = [*BUILT_IN, "class", "factory", "partial"]  # with any number of spatial dims
FEW = ["cbam", "class", "timm/test_convnext"]
FORMS: dict[str, Any] = {
    "bfloat16": (torch.bfloat16, torch.contiguous_format, False),
    "float16, channels last": (torch.float16, torch.channels_last, False),
    "autocast, channels last": (torch.float32, torch.channels_last, True),
    "float64": (torch.float64, torch.contiguous_format, False),
}


def assert_identity(network: nn.Module, model: nn.Module, x: torch.Tensor, *, autocast: bool = False) -> None:
    def run(net: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return net(x)

    for train in (False, True):
        assert_same_behaviour(network, model, run, train=train)


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_outputs_and_gradients_are_those_of_the_original_at_any_size_and_batch(name: str) -> None:
    network, model, x = citizen(name)
    for images in (x, torch.cat([x, x], -1)[:1]):
        assert_identity(network, model, images)


@pytest.mark.parametrize("where", swept([(1, False), (2, True)], [(1, True), (3, False), (3, True)]), ids=str)
@pytest.mark.parametrize("name", swept(EVERYWHERE[:5], EVERYWHERE[5:]))
def test_with_any_number_of_spatial_dims_and_channels_last(name: str, where: tuple[int, bool]) -> None:
    network, model, x = citizen(name, *where)
    dims, last = where
    assert [module.channel_dim for module in inserted(model).values()] == [-1 if last else -1 - dims] * 2
    assert_identity(network, model, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", swept(FEW, [name for name in [*ALL, *LIBRARIES, *MORE_OF_LIBRARIES] if name not in FEW])
)
def test_in_any_float_type_under_autocast_and_in_both_memory_formats(name: str, form: str) -> None:
    dtype, layout, autocast = FORMS[form]
    network, x = (given.to(dtype=dtype, memory_format=layout) for given in original(name))
    model = retrofitted(network, ALL.get(name, "se"), x)
    assert {p.dtype for module in inserted(model).values() for p in module.parameters()} == {dtype}
    if name not in MORE_OF_LIBRARIES:
        assert_identity(network, model, x, autocast=autocast)
        return
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = run(model, x), run(network, x)
    # random weights may overflow float16
    assert same_tensors([y.isfinite() for y in found], [y.isfinite() for y in wanted])
    assert same_tensors([y.nan_to_num() for y in found], [y.nan_to_num() for y in wanted])


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_the_first_step_moves_what_was_inserted_and_the_outputs(name: str) -> None:
    network, model, x = citizen(name)
    parameters = [p for module in inserted(model).values() for p in module.parameters()]
    for step in (1, 2):
        model.zero_grad()
        model(x).square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in parameters)
        torch.optim.SGD(parameters, 0.1).step()
        assert not torch.equal(model(x), network(x)), step
    if name in FACTORIES:  # f itself from the second step on
        assert all(p.grad is not None and p.grad.any() for p in parameters)


@pytest.mark.parametrize("name", swept(EVERYWHERE[:5], EVERYWHERE[5:]))
@pytest.mark.parametrize("last", [False, True])
def test_empty_batches_and_the_memory_format_are_kept(name: str, last: bool) -> None:
    module = next(iter(inserted(citizen(name, 2, last)[1]).values()))
    values = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    values = values.movedim(1, -1) if last else values
    assert module(values).stride() == values.stride()
    for given in (values[:0], values[:0].clone().requires_grad_()):
        assert module(given).shape == given.shape
    module(given).sum().backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_no_random_number_of_the_users_is_drawn_and_a_seed_gives_the_same_module(name: str) -> None:
    network, states = Network(), []
    for _ in range(2):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        states.append(retrofitted(network, ALL[name], inputs()).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
