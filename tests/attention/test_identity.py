"""Every attention starts as an exact identity, and learns from the first step on."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from attentions import ALL, BUILT_IN, EVERY_TIME, FACTORIES, IN_SWEEPS, Network, inputs, inserted, retrofitted
from sweeps import swept
from torch import Tensor, nn

EVERYWHERE = BUILT_IN | FACTORIES  # with any number of spatial dims


def outputs_and_gradients(model: nn.Module, x: Tensor, *, train: bool, autocast: bool) -> dict[str, Tensor]:
    model = copy.deepcopy(model).train(train)
    x = x.clone().requires_grad_()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.random.fork_rng():
        torch.manual_seed(5)  # of dropout
        with context:
            y = model(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    gradients = {
        name: p.grad for name, p in model.named_parameters() if "se_attention" not in name and p.grad is not None
    }
    return {
        "output": y,
        "input": x.grad,
        **gradients,
        **{name: b for name, b in model.named_buffers() if "se_attention" not in name},
    }


def assert_identity(attention: Any, dims: int, last: bool, dtype: torch.dtype, *, layout: bool, autocast: bool) -> None:
    network, x = Network(dims, last).to(dtype), inputs(dims, dtype)
    if layout:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model = retrofitted(network, attention, x)
    assert [m.channel_dim for m in inserted(model).values()] == [-1 if last else -1 - dims] * 2
    for train in (False, True):
        expected = outputs_and_gradients(network, x, train=train, autocast=autocast)
        found = outputs_and_gradients(model, x, train=train, autocast=autocast)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (name, train)
            assert found[name].dtype == value.dtype


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_outputs_and_gradients_are_those_of_the_original(name: str) -> None:
    assert_identity(ALL[name], 2, False, torch.float32, layout=False, autocast=False)


@pytest.mark.parametrize("where", swept([(1, False), (2, True)], [(1, True), (3, False), (3, True)]), ids=str)
@pytest.mark.parametrize("name", swept([*BUILT_IN, "class"], ["factory", "partial"]))
def test_with_any_number_of_spatial_dims_and_channels_last(name: str, where: tuple[int, bool]) -> None:
    assert_identity(EVERYWHERE[name], *where, torch.float32, layout=False, autocast=False)


@pytest.mark.parametrize("name", swept(["cbam", "class"], [name for name in ALL if name not in ("cbam", "class")]))
def test_in_half_precision_under_autocast_and_in_both_memory_formats(name: str) -> None:
    for dtype, layout, autocast in (
        (torch.bfloat16, False, False), (torch.float16, True, False), (torch.float32, True, True),
    ):  # fmt: skip
        assert_identity(ALL[name], 2, False, dtype, layout=layout, autocast=autocast)


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_the_first_step_moves_what_was_inserted_and_the_outputs(name: str) -> None:
    network, x = Network().eval(), inputs()
    model = retrofitted(network, ALL[name], x)
    parameters = [p for module in inserted(model).values() for p in module.parameters()]
    for step in (1, 2):
        model.zero_grad()
        model(x).square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in parameters)
        torch.optim.SGD(parameters, 0.1).step()
        assert not torch.equal(model(x), network(x)), step
    if name in FACTORIES:  # f itself from the second step on
        assert all(p.grad is not None and p.grad.any() for p in parameters)


@pytest.mark.parametrize("name", swept([*BUILT_IN, "class"], ["factory", "partial"]))
@pytest.mark.parametrize("last", [False, True])
def test_empty_batches_and_the_memory_format_are_kept(name: str, last: bool) -> None:
    network, x = Network(last=last).eval(), inputs()
    model = retrofitted(network, EVERYWHERE[name], x)
    module = next(iter(inserted(model).values()))
    values = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    values = values.movedim(1, -1) if last else values
    assert module(values).stride() == values.stride()
    assert module(values[:0]).shape == values[:0].shape
    assert module(values[:0].requires_grad_()).requires_grad


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_no_random_number_of_the_users_is_drawn_and_a_seed_gives_the_same_module(name: str) -> None:
    network, x = Network().eval(), inputs()
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        states.append(retrofitted(network, ALL[name], x).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
