"""Networks written as programs, of fragments of Python that may stand in a forward."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st

HEAD = """
import functools
import math
import random

import numpy as np
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


def conv_norm(conv, norm, x):
    x = conv(F.relu(x))
    return norm(x)
"""

ACTIVATIONS = [
    "F.relu({})",
    "F.silu({})",
    "Swish.apply({})",
    "{} * torch.sigmoid({})",
    "self.act({})",
    "F.leaky_relu({}, 0.1)",
    "torch.vmap(lambda image: F.relu(image) * 0.5)({})",
]
PYTHON = [
    "",
    "self.calls += 1",
    "self.seen.append(x.shape[0])",
    "x = x * self.cfg['alpha']",
    "if x.shape[-1] > 10:\n    x = x * 0.5",
    "if x.mean() > 0.3:\n    x = x - 0.25",
    "if self.training and random.random() < 0.3:\n    x = x + 0.1",
    "if self.training and torch.rand(1).item() < 0.3:\n    x = x - 0.1",
    "if self.training:\n    x = x * float(np.random.beta(0.5, 0.5)) * torch.rand(x.shape[0], 1, 1, 1)",
    "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(3)\n    x = x + torch.randn(1, 8, 1, 1)",
    "size = math.ceil(x.shape[-1] / 4)\nx = x + F.interpolate(F.adaptive_avg_pool2d(x, size), size=x.shape[-2:])",
    "with torch.autocast('cpu', enabled=False):\n    x = x + 0.5",
    "try:\n    assert x.dim() == 4\nexcept AssertionError:\n    x = x[None]",
    "for _ in range(2):\n    x = x * 0.9",
]
WAYS = [  # how the branch's last value comes to be
    "out = {value}",
    "out = {value}\nout = out * 1.0",
    "out = {value}\nout.mul_(0.5).clamp_(-3, 3)",
    "out = helper(lambda y: {value_of_y}, out)",
    "out = conv_norm(self.conv2, self.bn2, out)",
    "out = functools.partial(conv_norm, self.conv2, norm=self.bn2)(x=out)",
    "out = functools.reduce(lambda y, layer: layer(y), [F.relu, self.conv2, self.bn2], out)",
    "out = F.conv2d(out, self.conv2.weight, padding=1)",
    "out = (\n    {value}\n)  # a comment",
    "out = (\n    self.conv2(out)\n    .mul(0.5)  # è, a letter of two bytes\n    .add(0.1)\n)",
    "out = (\n    self\n    .bn2(\n        self  # of this block\n        .conv2(out)\n    )\n    .contiguous()\n)",
    "text = '''two\nlines'''; ñ = {'é→': {value}}['é→']; ü = \"\"\"of\ntext\"\"\"; out = ñ * (len(text) + len(ü))",
    "block = self\ndel self  # another name's by the time that SE is called\nout = block.bn2(block.conv2(out))",
    "if out is not None:\n    out = {value}",
    "if (out := {value}).dim() != 4:\n    return x",
    "(out,) = [{value_of_y} for y in (out,)]",
    "out, y = {value}, x",
    "outs = [out]\nouts[0] = {value}\nout = outs[0]",
    "self.kept = {'out': {value}}\nout = self.kept['out']\ndel self.kept",
    "def inner(y):\n    nonlocal count\n    count += 1\n    return {value_of_y}\ncount = 0\nout = inner(out) * count",
    "out = checkpoint(lambda y: {value_of_y}, out, use_reentrant=False) if self.training else {value}",
    "out = checkpoint(self.body, out, use_reentrant=False)",
    "out = checkpoint(self.body, out, use_reentrant=True) if self.training else self.body(out)",
    "out = Swish.apply({value})",
    "with torch.autocast('cpu', torch.bfloat16):\n    out = {value}\nout = out.float()",
]
ENDS = [
    "return x + out",
    "out += x\nreturn out",
    "return torch.add(x, out)",
    "x = x + out\nreturn F.relu(x)",
    "return out.add(x)",
    "return (\n    out\n    .mul(0.5)\n    .add(x)\n    .relu()\n)",
    "match x.shape:\n    case (_, _, h, w) if h == w:\n        return x + out\n    case _:\n        return out + x",
]
# over two blocks that are each other's equals, or the same one again, or of other widths; and how many get SE of their own
LOOPS = {
    "for layer in self.layers:\n    x = x + layer(x)": 2,
    "for layer in self.layers:\n    x = x * 1.0\n    x += layer(x)": 2,
    "for conv, bn in zip(self.convs, self.bns):\n    x = x + bn(conv(F.relu(x)))": 2,
    "for i in range(2):\n    x = self.layers[i](x) + x": 2,
    "for layer in self.layers:\n    x = x + layer.forward(x)": 2,
    "for _ in range(2):\n    x = x + self.layers[0](x)": 1,
    "for layer in self.widths:\n    x = F.relu(layer(x))\nfor layer in self.layers:\n    x = x + layer(x)": 2,
    "values = [x]\nfor layer in self.layers:\n    values.append(values[-1] + layer(values[-1]))\nx = values[-1]": 2,
}
LAST = ["self.bn2(self.conv2({}))", "self.body({})", "self.conv2({})"]

PARTS = {"act": ACTIVATIONS, "python": PYTHON, "way": WAYS, "end": ENDS, "last": LAST}


def residual(act: str, python: str, way: str, end: str, last: str, before: str = "") -> str:
    """The body of a residual block's forward."""
    out = act.replace("{}", "self.bn1(self.conv1(x))")
    way = way.replace("{value}", last.format("out")).replace("{value_of_y}", last.format("y"))
    return f"{before}\nout = {out}\n{python}\n{way}\n{end}"


def block(name: str, body: str) -> str:
    """The source of a block's class."""
    body = "\n".join(f"        {line}" for line in body.splitlines())
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


def network(
    blocks: str, names: list[str], container: str = "nn.Sequential({})", run: str = "x = self.blocks(x)"
) -> str:
    """The whole program: classes of blocks, and a network of some of them."""
    return f"""{HEAD}{blocks}

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = {container.format(", ".join(f"{name}()" for name in names))}

    def forward(self, x):
        x = self.stem(x)
        {run}
        return x
"""


def imported(path: Path, text: str) -> ModuleType:
    """The module of such a file."""
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@st.composite
def bodies(draw: st.DrawFn) -> str:
    """The body of the forward of a residual, inverted, dense or multi-branch block, or of a loop over several."""
    kind = draw(st.sampled_from(["residual", "residual", "inverted", "dense", "branches", "loop"]))
    part = {name: draw(st.sampled_from(texts)) for name, texts in PARTS.items()}
    before = draw(st.sampled_from(PYTHON))
    if "pool" in part["python"]:  # between branch and skip nothing may happen to x that makes another value of it
        part["python"] = ""
    if kind == "residual":
        return residual(**part, before=before)
    act, between = part["act"], f"{before}\n{part['python']}"
    if kind == "inverted":
        end = draw(st.sampled_from(ENDS[:3]))
        return f"{between}\nout = F.relu6(self.dwn(self.dw(self.expand(x))))\nout = self.project(out)\n{end}"
    if kind == "loop":
        return f"{before}\n{draw(st.sampled_from([*LOOPS]))}\nreturn x"
    if kind == "dense":
        out = act.replace("{}", "self.narrow(b)")
        return f"{between}\na, b = x.chunk(2, 1)\nout = {out}\nreturn torch.cat([a, out], 1)"
    a, b = (act.replace("{}", f"self.conv{i}(x)") for i in (1, 2))
    return f"{between}\na = {a}\nb = {b}\nreturn self.merge(torch.cat([a, b], 1))"


@st.composite
def programs(draw: st.DrawFn) -> str:
    """The source of a network of one to three kinds of blocks, in a container, in a loop, shared or nested."""
    names = [f"Block{i}" for i in range(draw(st.integers(1, 3)))]
    blocks = "".join(block(name, draw(bodies())) for name in names)
    stack = [draw(st.sampled_from(names)) for _ in range(draw(st.integers(1, 3)))]
    container = draw(st.sampled_from(["nn.Sequential({})", "nn.ModuleList([{}])", "nn.Sequential(nn.Sequential({}))"]))
    run = "x = self.blocks(x)"
    if "ModuleList" in container:
        run = "for block in self.blocks:\n            x = block(x)"
    elif draw(st.booleans()):
        run = "for block in self.blocks.children():\n            x = block(x)"
    return network(blocks, stack, container, run)


ATTENTIONS = st.sampled_from(["se", "se", "eca", "cbam", "static"])
PLACES = st.sampled_from([{}, {}, {"at": "stem"}, {"at": "blocks*"}, {"at": ["stem", "blocks.0*"], "auto": True}])


def _options(attention: str, places: dict[str, Any]) -> dict[str, Any]:
    return {"attention": attention, **places}


OPTIONS = st.builds(_options, ATTENTIONS, PLACES)
