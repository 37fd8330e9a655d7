"""Checks that two networks compute the same: both run on the same inputs, and outputs are compared bit for bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Inserted
from .surgery.record.copying import in_mode, modes_kept
from .surgery.record.inputs import Inputs, tensors_in
from .surgery.record.isolation import forked_randomness


@dataclass(frozen=True)
class Agreement:
    """The outcome of running two networks on the same inputs."""

    equal: bool  # whether every tensor of the outputs is ``torch.equal`` to its counterpart
    values: int  # number of values that were compared
    difference: float  # the largest, relative to the largest absolute value of the first network's outputs
    finite: bool  # whether all outputs of the first network are; if not, the comparison shows nothing


def agreement(first: nn.Module, second: nn.Module, inputs: Inputs, *, training: bool = False) -> Agreement:
    """Run both networks on the same inputs from the same random state, and compare their outputs; nothing is changed."""
    wanted, got = (tensors_in(_run(net, inputs, training)) for net in (first, second))
    alike = [(w.shape, w.dtype) for w in wanted] == [(g.shape, g.dtype) for g in got]
    return Agreement(
        equal=alike and all(map(torch.equal, wanted, got)),
        values=sum(w.numel() for w in wanted),
        difference=max(map(_relative_difference, wanted, got), default=0.0) if alike else float("inf"),
        finite=all(bool(torch.isfinite(w).all()) for w in wanted),
    )


def se_matters(model: nn.Module, inputs: Inputs) -> Agreement:
    """Compare the network with itself under random gates: if SE took no part in the computation, it would be equal, too.
    Both are copies with redrawn vectors, because a branch that is still zero would hide its SE."""
    model = copy.deepcopy(model)
    redraw_vectors(model)
    scrambled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for module in scrambled.modules():
        if isinstance(module, Inserted):
            _scramble(module, generator)
    return agreement(model, scrambled, inputs)


@torch.no_grad()
def _scramble(module: Inserted, generator: torch.Generator) -> None:
    """Give a module random gates, the same for every input, or random parameters if it has no gate layer."""
    if module.gate_layer:  # whose random weights could leave the gates at 1
        gates = 2 * torch.rand(module.channel, generator=generator, device="cpu")
        layer = module.get_submodule(module.gate_layer)
        layer.register_forward_hook(lambda layer, args, given: gates.to(given).expand_as(given))
        return
    for parameter in module.parameters():
        parameter.copy_(2 * torch.rand(parameter.shape, generator=generator, device="cpu"))


def redraw_vectors(model: nn.Module) -> None:
    """Redraw every vector among the parameters and buffers in place: scales and variances uniform in (0.5, 1.5), shifts
    and means normal. Norms of a fresh network hold ones and zeros, with which a fault might not show in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() != max(tensor.shape, default=1):
                continue
            shift = name.rpartition(".")[2] in ("bias", "running_mean")
            if shift:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu") * 0.1)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5)


@torch.no_grad()
def _run(model: nn.Module, inputs: Inputs, training: bool) -> Any:
    with modes_kept(model), forked_randomness():
        net = in_mode(copy.deepcopy(model) if training else model, training)
        return net(*inputs.args, **inputs.kwargs)


def _relative_difference(wanted: Tensor, got: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    scale = wanted.double().abs().max().item()
    return (wanted.double() - got.double()).abs().max().item() / (scale or 1.0)
