"""A retrofitted block runs its author's code, in whatever syntax, contexts and types it is written."""

from __future__ import annotations

import copy

import pytest
import python_blocks as blocks
import torch
from python_blocks import Block
from same_behaviour import check
from structure import Net
from torch import nn

from se_retrofit import RetrofitError, add_se

ALL = [
    cls
    for cls in vars(blocks).values()
    if isinstance(cls, type) and issubclass(cls, Block) and cls not in (Block, blocks.Behind)
]
CALLS = {
    blocks.Starred: [((None,), {"pads": (0, 0), "more": 1})],
    blocks.Arguments: [
        ((0.5,), {"store": {}}),
        ((torch.tensor(2.0), 2), {"mode": blocks.Mode.scale}),
        ((None, 0, [0.5, 2.0]), {"flag": True}),
        ((), {"factors": (), "flag": True}),
    ],
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("block", ALL, ids=lambda cls: cls.__name__)
def test_a_forward_runs_as_it_is(block: type[Block]) -> None:
    check(Net(block), CALLS.get(block, ()))


@pytest.mark.parametrize("block", [blocks.Arguments, blocks.Branches], ids=lambda cls: cls.__name__)
def test_any_recorded_call_will_do(block: type[Block]) -> None:
    x = torch.zeros(1, 3, 11, 9)
    check(Net(block), CALLS.get(block, ()), example_inputs=(x, 0.5, 3, [0.5]) if block is blocks.Arguments else x)


def test_a_generator_that_is_an_argument_is_no_value() -> None:
    with pytest.raises(RetrofitError, match="not the result of one expression"):
        add_se(Net(blocks.Weighed), 2, example_inputs=torch.zeros(1, 3, 9, 9))


def test_attributes_and_children_changed_after_the_retrofit_are_followed() -> None:
    model = Net(blocks.LooksUp).eval()
    retrofitted = add_se(model, 2)
    x = torch.randn(2, 3, 12, 12)
    for network in (model, retrofitted):
        network.block1.cfg["alpha"] = 2.0
        network.block1.state.alpha = 3.0
        network.block1.conv2 = copy.deepcopy(model.block2.conv2)
        network.block1.bn1 = nn.Identity()
        network.block2.drop.p = 0.0
        network.block2.bn1.momentum = 0.5
        network.train()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(retrofitted(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), retrofitted.buffers(), strict=True))


def test_a_retrofitted_block_in_another_dtype_follows_its_branches() -> None:
    model = Net(blocks.Branches).eval()
    ours, theirs = add_se(model, 2).double(), copy.deepcopy(model).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
