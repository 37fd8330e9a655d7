"""Ways to put SE into a network, for benchmarks/peers.py. Each takes a network, its inputs and the paths of its blocks, and returns a
network with SE. All but Composer's get an SE whose gates are exactly 1.0 at first, so that what is lost is lost by the surgery."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from se_retrofit import SEAttention, add_se


class SqueezeExcite2d(nn.Module):
    """Composer's: a gate between 0 and 1, from 64 hidden channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool_and_mlp = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 64, bias=False), nn.ReLU(),
            nn.Linear(64, channels, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pool_and_mlp(x)[:, :, None, None]


class SqueezeExciteConv2d(nn.Module):
    """Composer's wrapper."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.se = conv, SqueezeExcite2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.conv(x))  # type: ignore[no-any-return]


SE_CLASSES = (SEAttention, SqueezeExcite2d)


def with_add_se(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> nn.Module:
    return add_se(model, example_inputs=inputs)


def with_hooks(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> nn.Module:
    for path, channels in widths(model, inputs, blocks).items():
        block = model.get_submodule(path)
        block.hooked_se = SEAttention(channels, gate="identity")  # not se: timm's blocks would call that, too
        block.register_forward_hook(scale_output)
    return model


def scale_output(block: nn.Module, given: Any, output: Tensor) -> Any:
    return block.hooked_se(output)  # type: ignore[operator]


def with_sequential(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> nn.Module:
    for path, channels in widths(model, inputs, blocks).items():
        model.set_submodule(path, nn.Sequential(model.get_submodule(path), SEAttention(channels, gate="identity")))
    return model


def with_fx(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> nn.Module:
    """On what a norm or a convolution gives to an add."""
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.target not in (operator.add, operator.iadd, torch.add):
            continue
        for branch in node.args:
            module = modules.get(branch.target) if isinstance(branch, fx.Node) and branch.op == "call_module" else None
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd)):
                channels = getattr(module, "num_features", None) or module.out_channels
                name = f"se_{node.name}"
                traced.add_submodule(name, SEAttention(int(channels), gate="identity"))
                with traced.graph.inserting_after(branch):
                    made = traced.graph.call_module(name, (branch,))
                node.replace_input_with(branch, made)
                break
    traced.recompile()
    return traced


def with_composer(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> nn.Module:
    """On each ``Conv2d`` of 128 channels or more."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and min(module.in_channels, module.out_channels) >= 128:
            model.set_submodule(path, SqueezeExciteConv2d(module))
    return model


WAYS: dict[str, Callable[[nn.Module, tuple[Any, ...], list[str]], nn.Module]] = {
    "`add_se`": with_add_se,
    "forward hooks": with_hooks,
    "`nn.Sequential(block, SE)`": with_sequential,
    "`symbolic_trace`, node inserted": with_fx,
    "Composer's SqueezeExcite": with_composer,
}


def inside(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> nn.Module:
    """Behind the block's 3x3 convolution, as in RegNetY: a placement that one asks for."""
    return add_se(model, example_inputs=inputs, placement="3x3")


LANDING = {
    "`add_se`": with_add_se,
    '`placement="3x3"`': inside,
    **{name: way for name, way in WAYS.items() if name != "`add_se`"},
}


def widths(model: nn.Module, inputs: tuple[Any, ...], blocks: list[str]) -> dict[str, int]:
    """The channels that the blocks give, of those that give one value with channels in the second dim."""
    found: dict[str, int] = {}

    def note(path: str, module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 2:
            found[path] = output.shape[1]

    hooks = [model.get_submodule(p).register_forward_hook(partial(note, p)) for p in blocks if p]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return found
