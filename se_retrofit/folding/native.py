"""Conversion of retrofitted SE to the form of other libraries, and back: the plain sigmoid instead of twice the
sigmoid.

``x * 2*sigmoid(W2 relu(W1 mean(x)))`` is ``(2x) * sigmoid(W2 relu((W1/2) mean(2x)))``. The network computes ``2x``
if the weight and bias of the norm or convolution before SE are doubled; otherwise, the weights of the layers after it
are doubled. Factors of two are exact in every floating-point format.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attention import SEAttention
from ..errors import RetrofitError, check_module
from ..fusion.attention import check_unfused
from ..precision import tf32
from ..retrofit import check_retrofitted, has_se, plan_of
from ..surgery.record.copying import check_values, copied, in_mode
from ..surgery.record.graph import Record
from ..surgery.record.inputs import Inputs, described_inputs, float_dtype, in_dtype_of, tensors_in
from ..surgery.record.isolation import forked_randomness, isolated
from ..surgery.record.runs import record
from ..surgery.splice.undo import is_retrofitted
from .factors import Factors
from .matching import Gate, Part, copy_layers, matched, parts_of
from .measuring import relative_change

M = TypeVar("M", bound=nn.Module)


def to_native(model: nn.Module, target: nn.Module | None = None) -> nn.Module:
    """Convert a retrofitted network to plain-sigmoid gates: a copy of it, or a native SE network with its weights.

    Args:
        model: a network from ``add_se`` with the gate ``"identity"`` or ``"sigmoid"``.
        target: a native SE network, such as ``timm.create_model("seresnet50")``, whose layers and gates have the shapes of the
            model's, in the same order of execution. It is not changed; its weights don't matter.

    Returns:
        Without a target, a copy of the model with ``gate="sigmoid"``; with one, a copy of the target with the model's
        weights. Either computes what the model computes, which is checked by running both.

    Raises:
        RetrofitError: If the model is not retrofitted; a site has another attention than SE, or a factor of two
            can't be moved into the layers around it; the target does not fit (the message names the site or layer);
            or the outputs differ.
        TypeError: If one of them is not an nn.Module.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se, to_native
        >>> model = add_se(timm.create_model("resnet18"), reduction=16, min_hidden=8).eval()
        >>> native = to_native(model, timm.create_model("seresnet18"))
        >>> x = torch.randn(1, 3, 64, 64)
        >>> type(native.layer1[0].se).__name__, torch.allclose(native.eval()(x), model(x), atol=1e-4)
        ('SEModule', True)
    """
    _check_retrofitted(model, "to_native")
    if target is not None:
        _check_native(target)
    result = copied(model)
    with isolated(model), forked_randomness(), torch.no_grad(), tf32(False):
        own = _recorded(result)
        _scale(result, own, 2.0)
        plan = plan_of(result)
        for se in _ses(result).values():
            if se.gate == "identity":
                se.fc[3], se.gate = nn.Sigmoid(), "sigmoid"
            vars(se)["plan"] = replace(plan, options={**plan.options, "gate": "sigmoid"})
        _check_same(model, result, own.inputs, "the network with plain-sigmoid gates")
        if target is None:
            return result
        filled = copied(target)
        copy_layers(matched(parts_of(_recorded(result)), _parts_beside(own.inputs, model, filled)), result, filled)
        _check_same(model, filled, own.inputs, "the native network")
    return filled


def from_native(model: M, source: nn.Module) -> M:
    """Load all weights of a trained native SE network into a copy of a retrofitted network.

    Args:
        model: a network from ``add_se`` with the gate ``"identity"`` or ``"sigmoid"``; with ``bias=True`` if the native
            gates have biases. It is not changed; its weights don't matter.
        source: the native network, whose layers and gates have the shapes of the model's, in the same order of execution.

    Returns:
        A copy of the model that computes what the source computes, which is checked by running both.

    Raises:
        RetrofitError: If the model is not retrofitted, the two do not fit (the message names the site or layer), or the
            outputs differ.
        TypeError: If one of them is not an nn.Module.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se, from_native
        >>> source = timm.create_model("seresnet18").eval()
        >>> model = add_se(timm.create_model("resnet18"), reduction=16, min_hidden=8, bias=True)
        >>> filled = from_native(model, source).eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.allclose(filled(x), source(x), atol=1e-4)
        True
    """
    _check_retrofitted(model, "from_native")
    _check_native(source)
    result = copied(model)
    with isolated(model), forked_randomness(), torch.no_grad(), tf32(False):
        own = _recorded(result)
        pairs = matched(parts_of(own), _parts_beside(own.inputs, model, source))
        copy_layers([(theirs, ours) for ours, theirs in pairs], source, result)
        _scale(result, own, 0.5)
        _check_same(result, source, own.inputs, "the retrofitted network")
    return result


def _check_retrofitted(model: nn.Module, caller: str) -> None:
    check_retrofitted(model, f"and {caller} takes a retrofitted network")
    check_unfused(model, caller)
    check_values(model.named_parameters())
    for path, se in _ses(model).items():
        if not isinstance(se, SEAttention):
            raise RetrofitError(f"{path} is {se.summary()}, not SE, and has no native form; {caller} takes SE alone")


def _check_native(network: nn.Module) -> None:
    check_module(network, "the native network")
    if has_se(network):
        raise RetrofitError(f"this {type(network).__name__} was retrofitted by add_se; give a network with native SE")


def _ses(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if is_retrofitted(m)}


def _recorded(model: nn.Module) -> Record:
    """Record a retrofitted network on the shapes that the retrofit was recorded on, if they are known."""
    return record(model, described_inputs(plan_of(model).inputs, model))


def _parts_beside(inputs: Inputs, model: nn.Module, native: nn.Module) -> list[Part]:
    """Return the parts of the native network, recorded on the inputs of the retrofitted one."""
    parts = parts_of(record(native, in_dtype_of(native, inputs, float_dtype(model))))
    if not any(isinstance(part, Gate) for part in parts):
        raise RetrofitError(f"this {type(native).__name__} has no channel gate that was called, so it can't be matched")
    return parts


def _scale(model: nn.Module, record: Record, by: float) -> None:
    """Multiply the input or the output of each SE module with the gate ``2 * sigmoid`` by a power of two."""
    factors = Factors(model, record)
    todo = []
    for path, se in _ses(model).items():
        if se.gate != "identity":
            continue
        factor = torch.full((se.channel,), by, dtype=torch.float64, device="cpu")
        scalings = factors.backwards(path, factor)
        squeezed = scalings is not None  # SE's squeeze is larger, too
        if scalings is None:
            scalings = factors.forwards(path, factor)
        if scalings is None:
            raise RetrofitError(
                f"the factor 2 of the gate at {path} can't be moved into the network: neither the module "
                "that produces the scaled value nor all modules that use it can take it in"
            )
        todo.append((se, scalings, squeezed))
    for se, scalings, squeezed in todo:
        for scaling in scalings:
            scaling.apply(model)
        if squeezed:
            se.fc[0].weight.div_(by)


def _check_same(model: nn.Module, other: nn.Module, inputs: Inputs, what: str) -> None:
    """Raise an error unless two networks compute the same; the inputs are the model's."""
    given = inputs.of_one().with_values(torch.Generator().manual_seed(0))
    one, two = (_outputs(net, in_dtype_of(net, given, float_dtype(model))) for net in (model, other))
    apart = relative_change(two, one)
    if not apart <= max(torch.finfo(float_dtype(net)).eps for net in (model, other)) ** 0.5:
        raise RetrofitError(f"{what} does not compute the same: its outputs differ by {apart:.1e} of their norm")


def _outputs(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    copy = in_mode(copied(network, independent=True), False)
    device = next((p.device for p in copy.parameters()), torch.device("cpu"))
    placed = copied(inputs, lambda t: t.to(device, copy=True))
    return [t for t in tensors_in(copy(*placed.args, **placed.kwargs)) if t.is_floating_point()]
