"""Blocks whose class says how it is copied and pickled are copied and pickled in that way, SE included."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_untouched, randomise_se, randomised, same_tensors, snapshot
from torch import Tensor, nn

from se_retrofit import add_se, fuse_se, remove_se


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.conv1(x).relu()))


def rebuilt(cls: type[Block], width: int, state: dict[str, Any]) -> Block:
    block = cls(width)
    block.load_state_dict(state)
    return block


class Reduced(Block):
    def __reduce__(self) -> Any:
        return rebuilt, (type(self), self.width, self.state_dict())


class ReducedByName(Block):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (ReducedByName, self.width, self.state_dict())


class Stateful(Block):
    def __getstate__(self) -> Any:
        return {"width": self.width, "tensors": self.state_dict()}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["width"])  # type: ignore[misc]
        self.load_state_dict(state["tensors"])


class ReducedWithState(Stateful):
    def __reduce__(self) -> Any:
        return type(self), (self.width,), self.__getstate__()


class NewWithArguments(Block):
    def __new__(cls, width: int) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> Any:
        return (self.width,)


class Parent(Block):
    """A child knows the block that it is in."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        vars(self.conv1)["parent"] = self


CLASSES = [Reduced, ReducedByName, Stateful, ReducedWithState, NewWithArguments, Parent]
WAYS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize(("inplace", "change"), [(False, nn.Identity()), (True, fuse_se)], ids=["copied", "fused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_block_is_copied_as_its_class_says_with_its_se(cls: Any, way: str, inplace: bool, change: Any) -> None:
    original = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), cls(8))).eval()
    before, keys = snapshot(original), list(original.state_dict())
    model = change(randomise_se(add_se(original, 2, inplace=inplace))).eval()  # the copy of a rebuilt one trains
    if not inplace:
        assert_untouched(original, before)
    again = WAYS[way](model).eval()
    assert type(again[1]) is type(model[1])
    assert list(again.state_dict()) == list(model.state_dict())
    assert same_tensors(list(again.state_dict().values()), list(model.state_dict().values()))
    assert not {id(t) for t in again.parameters()} & {id(t) for t in model.parameters()}
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(again(x), model(x))
    removed = remove_se(again)
    assert type(removed[1]) is cls
    assert list(removed.state_dict()) == keys
    if cls is Parent:
        assert again[1].conv1.parent is again[1]
