"""Planning is not noticed by anybody else; a retrofitted model serves several threads."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import python_blocks as blocks
import torch
from class_blocks import Rebuilt
from networks import random_states, randomise_se, randomised
from same_behaviour import Net
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from se_retrofit import add_se, load_retrofitted, plan_of, plan_se, report, save_retrofitted


@pytest.mark.parametrize("block", [blocks.PythonRandom, blocks.NumpyRandom, blocks.TorchRandomItem, blocks.SizedNoise])
def test_the_random_numbers_of_other_threads_are_their_own(block: type[nn.Module]) -> None:
    model, stop, drawn = Net(block), threading.Event(), []

    def draw() -> None:
        while not stop.is_set() and len(drawn) < 200_000:
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    def expected(count: int) -> list[tuple[float, float, float]]:
        seed()
        return [(random.random(), float(np.random.rand()), float(torch.rand(()))) for _ in range(count)]

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(3):
            plan_se(model, 2)
    finally:
        stop.set()
        thread.join()
    assert len(drawn) > 10
    assert len(set(drawn)) == len(drawn), "numbers were drawn twice"
    if block is blocks.SizedNoise:
        assert drawn == expected(len(drawn))


def test_two_threads_call_one_model_in_two_ways_at_once() -> None:
    model = randomise_se(add_se(randomised(Net(blocks.Arguments)).eval(), 2))
    x = torch.randn(2, 3, 16, 16)
    ways = [((), {}), ((0.5, 2, [0.5]), {"flag": True})]
    with torch.no_grad():
        alone = [model(x, *args, **kwargs) for args, kwargs in ways]
    wrong: list[int] = []

    def call(number: int) -> None:
        args, kwargs = ways[number]
        for _ in range(30):
            with torch.no_grad():
                output = model(x, *args, **kwargs)
            first, expected = (output, alone[number]) if number == 0 else (output[0], alone[number][0])
            if not torch.equal(first, expected):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@dataclass
class Sample:
    image: Tensor
    scale: float


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), BasicBlock(8, 8)

    def forward(self, sample: Sample, more: dict[str, list[Tensor]] | None = None) -> dict[str, Tensor]:
        x = self.block(self.stem(sample.image) * sample.scale)
        if more is not None:
            x = x + more["add"][0].mean()
        return {"out": x}


def test_inputs_may_be_any_structure_and_are_needed_once_only(tmp_path) -> None:
    model = Structured().eval()
    inputs = ((Sample(torch.zeros(1, 3, 17, 17), 0.5),), {"more": {"add": [torch.zeros(3)]}})
    retrofitted = add_se(model, 2, example_inputs=inputs)
    assert len(plan_of(retrofitted).sites) == 1
    assert "8x15x15" in str(report(retrofitted))
    again = load_retrofitted(save_retrofitted(retrofitted, tmp_path / "saved"), base=Structured())
    sample = Sample(torch.randn(2, 3, 9, 9), 2.0)
    assert torch.equal(again(sample)["out"], model(sample)["out"])


class Sized(nn.Module):
    """Takes one size only, which it keeps as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 37
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), nn.Flatten(), nn.Linear(8 * 35 * 35, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_size_among_the_models_attributes_is_tried_first() -> None:
    assert plan_of(add_se(Sized())).inputs["args"][0]["tensor"] == [2, 3, 37, 37]


def test_a_copy_that_is_built_anew_draws_no_global_numbers_while_other_threads_are_about() -> None:
    model = Net(Rebuilt)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)  # as a notebook's or a progress bar's
    other.start()
    try:
        states = list(random_states())
        add_se(model, 2, example_inputs=torch.zeros(1, 3, 9, 9))
        assert list(random_states()) == states
    finally:
        stop.set()
        other.join()
