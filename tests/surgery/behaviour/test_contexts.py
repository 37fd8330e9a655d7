"""Contexts, decorators, custom autograd functions and scripted code keep their meaning."""

from __future__ import annotations

import context_blocks as blocks
import pytest
from python_blocks import Block
from same_behaviour import Net, check

ALL = [cls for cls in vars(blocks).values() if isinstance(cls, type) and issubclass(cls, Block) and cls is not Block]


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("block", ALL, ids=lambda cls: cls.__name__)
def test_contexts_and_code_beneath_python_work_as_before(block: type[Block]) -> None:
    check(Net(block))
