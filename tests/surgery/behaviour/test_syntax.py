"""A call of SE fits into whatever syntax the value is written in."""

from __future__ import annotations

import pytest
import syntax_blocks as blocks
import torch
from python_blocks import Block
from same_behaviour import Net, check

from se_retrofit import RetrofitError, add_se

ALL = [
    cls
    for cls in vars(blocks).values()
    if isinstance(cls, type) and issubclass(cls, Block) and cls not in (Block, blocks.Branch)
]


@pytest.mark.parametrize("block", ALL, ids=lambda cls: cls.__name__)
def test_a_value_is_scaled_in_any_syntax(block: type[Block]) -> None:
    check(Net(block))


def test_a_generator_that_is_an_argument_is_no_value() -> None:
    with pytest.raises(RetrofitError, match="not the result of one expression"):
        add_se(Net(blocks.Weighed), 2, example_inputs=torch.zeros(1, 3, 9, 9))
