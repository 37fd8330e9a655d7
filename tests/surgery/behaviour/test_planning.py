"""Planning is not noticed by anybody else; a retrofitted model serves several threads."""

from __future__ import annotations

import cProfile
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import pytest
import python_blocks as blocks
import torch
from networks import random_states, randomise_se, randomised, same_tensors
from structure import Net
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import BasicBlock

from se_retrofit import RetrofitError, add_se, has_se, inspect_se, load_retrofitted, plan_of, plan_se, save_retrofitted


def test_a_network_is_retrofitted_under_a_profiler_and_what_that_has_counted_is_there() -> None:
    with cProfile.Profile() as profile:
        assert has_se(add_se(Net(blocks.Random), 2))
    (forward,) = [entry for entry in profile.getstats() if entry.code is blocks.Random.forward.__code__]
    assert forward.callcount > 1


@pytest.mark.parametrize(("get", "put"), [(sys.gettrace, sys.settrace), (sys.getprofile, sys.setprofile)])
def test_a_network_is_retrofitted_under_a_trace_function_which_goes_on(get: Any, put: Any) -> None:
    before, seen = get(), set()

    def note(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code is blocks.Random.forward.__code__:
            seen.add((event, frame.f_lineno))
        return note

    put(note)
    try:
        assert has_se(add_se(Net(blocks.Random), 2))
        assert get() is note
    finally:
        put(before)
    assert len(seen) > 1


def test_a_plan_depends_on_no_random_state_and_moves_none() -> None:
    plans = []
    for seed in range(2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        model = Net(blocks.Random)
        states = list(random_states())
        plans.append(plan_se(model, 2))
        assert list(random_states()) == states
    assert plans[0] == plans[1]


def test_two_threads_call_one_model_in_two_ways_at_once() -> None:
    model = randomise_se(add_se(randomised(Net(blocks.Arguments)).eval(), 2))
    x = torch.randn(2, 3, 8, 8)
    ways = [((), {}), ((0.5, 2, [0.5]), {"flag": True})]
    with torch.no_grad():
        alone = [model(x, *args, **kwargs) for args, kwargs in ways]

    def called(number: int) -> list[Tensor]:
        args, kwargs = ways[number % 2]
        with torch.no_grad():
            return list(tree_leaves(model(x, *args, **kwargs)))

    with ThreadPoolExecutor(2) as threads:
        for number, outputs in enumerate(threads.map(called, range(40))):
            assert same_tensors(outputs, list(tree_leaves(alone[number % 2])))


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), BasicBlock(8, 8)

    def forward(self, sample: dict[str, Any], more: tuple[list[Tensor], ...] = ()) -> dict[str, Tensor]:
        x = self.block(self.stem(sample["image"]) * sample["scale"])
        return {"out": x + more[0][0].mean() if more else x}


def test_inputs_may_be_nested_and_are_needed_once_only(tmp_path) -> None:
    model = Structured().eval()
    inputs = (({"image": torch.zeros(1, 3, 17, 17), "scale": 0.5},), {"more": ([torch.zeros(3)],)})
    retrofitted = add_se(model, 2, example_inputs=inputs)
    assert len(plan_of(retrofitted).sites) == 1
    assert "8x15x15" in str(inspect_se(retrofitted).report())
    again = load_retrofitted(save_retrofitted(retrofitted, tmp_path / "saved"), base=Structured())
    sample = {"image": torch.randn(2, 3, 9, 9), "scale": 2.0}
    assert torch.equal(again(sample)["out"], model(sample)["out"])


@dataclass
class Sample:
    image: Tensor


class Sampled(nn.Sequential):
    def forward(self, sample: Sample) -> Tensor:
        return super().forward(sample.image)


def test_inputs_may_be_of_any_class_and_are_given_again_for_a_printout() -> None:
    inputs = (Sample(torch.zeros(1, 3, 17, 17)),)
    retrofitted = add_se(Sampled(nn.Conv2d(3, 8, 3), BasicBlock(8, 8)), 2, example_inputs=inputs)
    assert plan_of(retrofitted).inputs is None
    assert "8x15x15" in str(inspect_se(retrofitted, example_inputs=inputs).report())
    with pytest.raises(RetrofitError, match="example_inputs"):
        inspect_se(retrofitted)


def test_a_size_among_the_models_attributes_is_tried_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), nn.Flatten(), nn.Linear(8 * 35 * 35, 2))
    model.image_size = 37  # it takes no other
    assert plan_of(add_se(model)).inputs["args"][0]["tensor"] == [2, 3, 37, 37]
