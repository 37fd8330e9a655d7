"""Which parameters of a module to scale so that the module scales its output, or accepts a scaled input, by channel.

Candidates are tried on a copy in float64: a subclass with its own padding passes, one that standardises its weight does
not, and in a weight-normalised convolution, the norm is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..surgery.record.copying import copied, in_mode
from ..surgery.record.graph import Op

# the factor for each parameter by name, in a shape that broadcasts to the parameter's
Scales = dict[str, Tensor]

CLOSE = 1e-9  # relative, in float64


def along(factor: Tensor, dim: int, dims: int) -> Tensor:
    """Reshape factors for the indices of a dim so that they broadcast over a tensor with ``dims`` dims."""
    shape = [1] * dims
    shape[dim] = -1
    return factor.reshape(shape)


def scales_output(module: nn.Module, op: Op, factor: Tensor, channel_dim: int) -> Scales | None:
    """Return the factors for a module's parameters that multiply each channel of its output by its factor."""
    return _first_right(module, op, _for_output(module, factor), lambda run, x: times(run(x), factor, channel_dim))


def scales_input(module: nn.Module, op: Op, factor: Tensor, channel_dim: int) -> Scales | None:
    """Return the factors for a module's parameters that have the same effect as multiplying its input by the factor."""
    return _first_right(module, op, _for_input(module, op, factor), lambda run, x: run(times(x, factor, channel_dim)))


def times(x: Tensor, factor: Tensor, dim: int) -> Tensor:
    return x * along(factor, dim, x.dim())


def _for_output(module: nn.Module, factor: Tensor) -> Iterator[Scales]:
    """Yield candidates: each parameter along a dim, together with the bias."""
    own = dict(module.named_parameters())
    biases = {
        n: along(factor, 0, p.dim())
        for n, p in own.items()
        if n.split(".")[-1] == "bias" or n.startswith("parametrizations.bias.")
    }
    for dim in (0, 1):  # a transposed convolution has its output channels in dim 1
        for name, parameter in own.items():
            if name not in biases and parameter.dim() > dim and parameter.shape[dim] == len(factor):
                yield {name: along(factor, dim, parameter.dim()), **biases}


def _for_input(module: nn.Module, op: Op, factor: Tensor) -> Iterator[Scales]:
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        conv, weight = op.conv, parameter
        if conv is None or conv.groups == 1:
            for dim in (1, 0):
                if weight.shape[dim] == len(factor):
                    yield {name: along(factor, dim, weight.dim())}
        elif conv.transposed and weight.shape[0] == len(factor):
            yield {name: along(factor, 0, weight.dim())}
        elif weight.shape[:2] == (conv.outputs, conv.inputs // conv.groups) and conv.inputs == len(factor):
            by_group = factor.reshape(conv.groups, -1).repeat_interleave(conv.outputs // conv.groups, 0)
            yield {name: by_group.reshape(*by_group.shape, *[1] * (weight.dim() - 2))}


def _first_right(
    module: nn.Module, op: Op, candidates: Iterator[Scales], wanted: Callable[[nn.Module, Tensor], Tensor]
) -> Scales | None:
    """Return the first candidate with which a copy of the module has the wanted output for a random input."""
    if not op.data:
        return None
    x = torch.rand(_small(op), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu") - 0.3
    try:
        original = in_mode(copied(module, _in_float64, independent=True), False)
        with torch.no_grad():
            right = wanted(original, x)
            for scales in candidates:
                trial = copied(original, independent=True)
                for name, scale in scales.items():
                    trial.get_parameter(name).mul_(scale)
                if (trial(x) - right).abs().max() <= CLOSE * right.abs().max():
                    return scales
    except Exception:  # from an arbitrary forward: if it can't be tried, nothing is folded into it
        return None
    return None


def _in_float64(tensor: Tensor) -> Tensor:
    value = tensor.detach().to("cpu", copy=True)
    return value.double() if value.is_floating_point() else value


def _small(op: Op) -> list[int]:
    """Return the shape of a small input: one sample, and no larger than a kernel needs."""
    shape = [int(s) for s in op.data[0].shape]
    if op.conv is None or len(shape) <= len(op.conv.kernel):
        return shape
    dilation = getattr(op.module, "dilation", 1)
    dims = len(op.conv.kernel)
    dilations = dilation if isinstance(dilation, tuple) else (dilation,) * dims
    for i, (k, d) in enumerate(zip(op.conv.kernel, dilations, strict=True)):
        shape[len(shape) - dims + i] = min(shape[len(shape) - dims + i], 2 * d * (k - 1) + 3)
    return [1, *shape[1:]] if len(shape) == dims + 2 else shape
