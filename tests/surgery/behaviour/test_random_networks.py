"""Networks composed at random, each written as a program and imported, keep the contract; one that does not is printed as a
program that runs by itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from same_behaviour import check
from torch import nn

from se_retrofit import plan_se

HEAD = """
import math
import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


def helper(module, x):
    return module(x)
"""

ACTIVATIONS = [
    "F.relu({})",
    "F.silu({})",
    "Swish.apply({})",
    "{} * torch.sigmoid({})",
    "self.act({})",
    "F.leaky_relu({}, 0.1)",
]
PYTHON = [
    "",
    "self.calls += 1",
    "self.seen.append(x.shape[0])",
    "x = x * self.cfg['alpha']",
    "if x.shape[-1] > 10:\n    x = x * 0.5",
    "if self.training and random.random() < 0.3:\n    x = x + 0.1",
    "if self.training and torch.rand(1).item() < 0.3:\n    x = x - 0.1",
    "size = math.ceil(x.shape[-1] / 4)\nx = x + F.interpolate(F.adaptive_avg_pool2d(x, size), size=x.shape[-2:])",
    "with torch.autocast('cpu', enabled=False):\n    x = x + 0.5",
    "try:\n    assert x.dim() == 4\nexcept AssertionError:\n    x = x[None]",
    "for _ in range(2):\n    x = x * 0.9",
]
WAYS = [  # how the branch's last value comes to be
    "out = {value}",
    "out = {value}\nout = out * 1.0",
    "out = helper(lambda y: {value_of_y}, out)",
    "out = (\n    {value}\n)  # a comment",
    "if out is not None:\n    out = {value}",
    "out = checkpoint(lambda y: {value_of_y}, out, use_reentrant=False) if self.training else {value}",
]
ENDS = [
    "return x + out",
    "out += x\nreturn out",
    "return torch.add(x, out)",
    "x = x + out\nreturn F.relu(x)",
    "return out.add(x)",
]
LOOPS = [  # over blocks that are each other's equals, or the same one again, or of other widths
    "for layer in self.layers:\n    x = x + layer(x)",
    "for layer in self.layers:\n    x = x * 1.0\n    x += layer(x)",
    "for conv, bn in zip(self.convs, self.bns):\n    x = x + bn(conv(F.relu(x)))",
    "for i in range(2):\n    x = self.layers[i](x) + x",
    "for layer in self.layers:\n    x = x + layer.forward(x)",
    "for _ in range(2):\n    x = x + self.layers[0](x)",
    "for layer in self.widths:\n    x = F.relu(layer(x))\nfor layer in self.layers:\n    x = x + layer(x)",
    "values = [x]\nfor layer in self.layers:\n    values.append(values[-1] + layer(values[-1]))\nx = values[-1]",
]
LAST = ["self.bn2(self.conv2({}))", "self.body({})", "self.conv2({})"]


@st.composite
def blocks(draw: st.DrawFn, name: str) -> str:
    """The source of a class of residual, inverted, dense or multi-branch blocks, or of loops over several."""
    kind = draw(st.sampled_from(["residual", "residual", "inverted", "dense", "branches", "loop"]))
    act = draw(st.sampled_from(ACTIVATIONS))
    # between branch and skip nothing may happen to x that makes another value of it than the block's input
    python = [draw(st.sampled_from(PYTHON)), draw(st.sampled_from([p for p in PYTHON if "pool" not in p]))]
    lines = [*python[0].splitlines()]
    if kind == "residual":
        value = draw(st.sampled_from(LAST))
        lines += [f"out = {act.replace('{}', 'self.bn1(self.conv1(x))')}", *python[1].splitlines()]
        way = (
            draw(st.sampled_from(WAYS))
            .replace("{value}", value.format("out"))
            .replace("{value_of_y}", value.format("y"))
        )
        lines += [*way.splitlines(), *draw(st.sampled_from(ENDS)).splitlines()]
    elif kind == "inverted":
        lines += [
            *python[1].splitlines(),
            "out = F.relu6(self.dwn(self.dw(self.expand(x))))",
            "out = self.project(out)",
        ]
        lines += draw(st.sampled_from(ENDS[:3])).splitlines()
    elif kind == "loop":
        lines += [*draw(st.sampled_from(LOOPS)).splitlines(), "return x"]
    elif kind == "dense":
        lines += [*python[1].splitlines(), "a, b = x.chunk(2, 1)", f"out = {act.replace('{}', 'self.narrow(b)')}"]
        lines += ["return torch.cat([a, out], 1)"]
    else:
        lines += [
            *python[1].splitlines(),
            f"a = {act.replace('{}', 'self.conv1(x)')}",
            f"b = {act.replace('{}', 'self.conv2(x)')}",
        ]
        lines += ["return self.merge(torch.cat([a, b], 1))"]
    body = "\n".join(f"        {line}" for line in lines)
    return f"""

class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.expand, self.project = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.dw, self.dwn = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.narrow, self.merge = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(2)
        )
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.widths = nn.ModuleList([nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)])
        self.act = nn.ReLU()
        self.calls, self.seen, self.cfg = 0, [], {{"alpha": 0.5}}

    def forward(self, x):
{body}
"""


@st.composite
def programs(draw: st.DrawFn) -> str:
    """The source of a network of one to three kinds of blocks, in a container, in a loop, shared or nested."""
    count = draw(st.integers(1, 3))
    names = [f"Block{i}" for i in range(count)]
    text = HEAD + "".join(draw(blocks(name)) for name in names)
    stack = [draw(st.sampled_from(names)) for _ in range(draw(st.integers(1, 3)))]
    container = draw(st.sampled_from(["nn.Sequential({})", "nn.ModuleList([{}])", "nn.Sequential(nn.Sequential({}))"]))
    made = ", ".join(f"{name}()" for name in stack)
    run = "x = self.blocks(x)"
    if "ModuleList" in container:
        run = "for block in self.blocks:\n            x = block(x)"
    elif draw(st.booleans()):
        run = "for block in self.blocks.children():\n            x = block(x)"
    return (
        text
        + f"""

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = {container.format(made)}

    def forward(self, x):
        x = self.stem(x)
        {run}
        return x
"""
    )


ATTENTIONS = st.sampled_from(["se", "se", "eca", "cbam", "static"])
PLACES = st.sampled_from([{}, {}, {"at": "stem"}, {"at": "blocks*"}, {"at": ["stem", "blocks.0*"], "auto": True}])
OPTIONS = st.builds(lambda attention, places: {"attention": attention, **places}, ATTENTIONS, PLACES)


def imported(program: str, folder: Path) -> type[nn.Module]:
    name = f"random_network_{abs(hash(program))}"
    path = folder / f"{name}.py"
    path.write_text(program, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.Network


def keeps_the_contract(program: str, options: dict[str, Any], folder: Path) -> None:
    network = imported(program, folder)
    try:
        torch.manual_seed(0)
        model = network()
        check(model, sites=None, sizes=((2, 3, 12, 12), (1, 3, 7, 9)), **options)
        if "at" not in options:
            each_convolution_is_in_a_block(model)
    except Exception as error:
        error.add_note(f"add_se(model, 2, **{options}); the network, as a program:\n{program}")
        raise


def each_convolution_is_in_a_block(model: nn.Module) -> None:
    """Each convolution over space that runs is part of a block with SE, or of one that is skipped, with the reason."""
    ran: set[str] = set()
    convs = {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1}
    handles = [m.register_forward_hook(lambda *_, path=path: ran.add(path)) for path, m in convs.items()]
    model(torch.randn(2, 3, 12, 12))
    for handle in handles:
        handle.remove()
    plan = plan_se(model)
    listed = {path for skip in plan.skipped for path in skip.convolutions}
    assert listed <= ran
    assert all(skip.reason for skip in plan.skipped)
    for path in ran - listed:
        assert any(path == site.block or path.startswith(f"{site.block}.") for site in plan.sites), path


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=programs(), options=OPTIONS)
def test_networks_composed_at_random_keep_the_contract(
    program: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keeps_the_contract(program, options, tmp_path_factory.mktemp("networks"))


@pytest.mark.sweep
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=programs(), options=OPTIONS)
def test_many_more_networks_composed_at_random_keep_the_contract(
    program: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keeps_the_contract(program, options, tmp_path_factory.mktemp("networks"))
