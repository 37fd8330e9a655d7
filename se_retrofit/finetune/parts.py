"""The parts of a network that a fine-tune treats separately, when each of them is trained, and the network's state."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..attention import Inserted
from ..errors import RetrofitError, check_module, check_unwrapped
from ..models import Base
from ..retrofit import warn_of_lost_sites
from ..surgery.record.copying import check_whole, modes_kept
from ..surgery.record.roles import module_role
from .config import FinetuneConfig

TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")
AUXILIARY_HEADS = ("aux1.fc2", "aux2.fc2", "AuxLogits.fc")  # in torchvision's GoogLeNet and Inception


def check_network(model: Any) -> None:
    """Raise an error if this is not a network that can be trained or evaluated here."""
    check_module(model)
    warn_of_lost_sites(model)
    check_unwrapped(model)  # finetune wraps and compiles it itself
    check_whole((*model.named_parameters(), *model.named_buffers()))
    unmade = [name for name, value in model.named_parameters() if is_lazy(value) or value.is_meta]
    if unmade:
        raise RetrofitError(
            f"{unmade[0]} has no values yet; call the network once on an input where it is lazy, or load its weights where it is "
            "on the meta device"
        )


def count(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def se_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Inserted)]


def head_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that compute the logits, including auxiliary classifiers: those of timm's ``get_classifier``,
    or the last Linear or Conv of torchvision's ``fc``, ``classifier``, ``heads`` or ``head``; empty if the network has
    none of these."""
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        found = get_classifier()
        heads = list(found) if isinstance(found, (tuple, list)) else [found]
        return [head for head in heads if isinstance(head, nn.Module) and any(True for _ in head.parameters())]
    return [model.get_submodule(path) for path in _head_paths(model)]


def _head_paths(model: nn.Module) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for attribute in TORCHVISION_HEADS:
        inside = [path for path in modules if path == attribute or path.startswith(f"{attribute}.")]
        layers = [path for path in inside if isinstance(modules[path], (nn.Linear, nn.Conv2d))]
        if layers:
            return [layers[-1], *(path for path in AUXILIARY_HEADS if path in modules)]
    return []


def head_size(model: nn.Module) -> int | None:
    """Return the number of classes of the head, or None if it is unknown."""
    sizes = [getattr(head, name, None) for head in head_of(model) for name in ("out_features", "out_channels")]
    return next((size for size in [*sizes, getattr(model, "num_classes", None)] if isinstance(size, int)), None)


def new_head(model: nn.Module, num_classes: int) -> None:
    """Give the network a new head for ``num_classes``, in its library's own way: by timm's ``reset_classifier``, or by
    replacing the last layer of a torchvision network. The new weights are drawn from torch's global generator.

    Raises:
        RetrofitError: If the network has no known head; it is unchanged then.

    Example:
        >>> import torch, timm
        >>> from se_retrofit.finetune import new_head
        >>> model = timm.create_model("resnet10t")
        >>> new_head(model, 10)
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    base = Base.noted(model)
    reset_classifier = getattr(model, "reset_classifier", None)
    if callable(reset_classifier):
        like = next(model.parameters())
        reset_classifier(num_classes)
        model.to(device=like.device)
    elif not (paths := _head_paths(model)):
        raise RetrofitError(
            f"{type(model).__name__} has no reset_classifier, and no {', '.join(TORCHVISION_HEADS)} with a last layer: "
            f"give it a head for {num_classes} classes yourself, and leave num_classes out"
        )
    else:
        for path in paths:
            model.set_submodule(path, _resized(model.get_submodule(path), num_classes))
        if isinstance(getattr(model, "num_classes", None), int):
            model.num_classes = num_classes  # type: ignore[assignment]
    if base is not None:
        replace(base, kwargs={**base.kwargs, "num_classes": num_classes}).note(model)


def _resized(layer: nn.Module, outputs: int) -> nn.Module:
    where: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, bias=layer.bias is not None, **where)
    assert isinstance(layer, nn.Conv2d)
    size, bias = layer.kernel_size, layer.bias is not None
    return nn.Conv2d(layer.in_channels, outputs, size, layer.stride, layer.padding, bias=bias, **where)  # type: ignore[arg-type]


# What is trained in which epoch; the rest is frozen, including running statistics


def trained_in(config: FinetuneConfig, epoch: int | None) -> str:
    """Return the part that is trained in an epoch (from 0), as named by ``config.trainable``; with None, the part that
    would be trained sooner or later if the run were extended."""
    unfrozen = config.unfreeze_epoch is not None and (epoch is None or epoch + 1 >= config.unfreeze_epoch)
    return "all" if unfrozen else config.trainable


def trained_parts(model: nn.Module, part: str) -> list[nn.Module]:
    """Return the modules that ``part`` names."""
    if part == "all":
        return [model]
    name, heads = type(model).__name__, head_of(model)
    wanted = {"se": lambda module: isinstance(module, Inserted), "norms": is_norm}.get(part.partition("+")[0])
    modules = [module for module in model.modules() if wanted is not None and wanted(module)]
    if part.startswith("se") and not modules:
        raise RetrofitError(
            f'trainable="{part}" needs SE modules, and this {name} has none; retrofit it first: model = add_se(model)'
        )
    if part.startswith("norms") and not modules:
        raise RetrofitError(f'trainable="{part}": no norm of {name} has parameters; use "head" or "all"')
    if part.endswith("head") and not heads:
        raise RetrofitError(f'trainable="{part}": no head found in {name}; use "se" or "all"')
    return modules if part == "se" else modules + heads


def is_norm(module: nn.Module) -> bool:
    """Return whether a module with a scale for each channel is a norm: it undoes any scaling of its input."""
    own = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
    if not own or len(own) > 2 or any(p.dim() != 1 for p in own):
        return False
    if module_role(module) == "norm":
        return True
    channels = len(own[0])
    for shape in ((4, channels), (4, channels, 5), (4, channels, 5, 5), (4, 5, 5, channels), (4, channels, 3, 3, 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(own[0])
        with contextlib.suppress(Exception), torch.no_grad():  # fails if the norm is for other dims
            first, second = (copy.deepcopy(module).train()(scale * x) for scale in (16, 64))
            return bool(
                torch.allclose(first.float(), second.float(), rtol=0.02, atol=0.02) and first.float().std() > 0.02
            )
    return False


def choose_trainable(model: nn.Module, part: str, given: dict[str, bool]) -> None:
    """Set ``requires_grad`` for the modules that ``part`` names only, or as ``given`` if that is the whole network."""
    chosen = {id(p) for module in trained_parts(model, part) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(given.get(name, True) if part == "all" else id(parameter) in chosen)


def set_modes(model: nn.Module, part: str, freeze_bn: bool) -> None:
    """Set training mode, except for modules that must not change.

    Frozen modules with buffers (running statistics, power iterations) are set to eval mode, so that the buffers stay
    the same bit for bit; with ``freeze_bn``, so are all norms.
    """
    model.train()
    chosen = {id(m) for module in trained_parts(model, part) for m in module.modules()}
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        statistics = isinstance(module, _NormBase) or any(name.startswith("running_") for name in own)
        if (own and id(module) not in chosen) or (freeze_bn and statistics):
            module.eval()


@contextlib.contextmanager
def as_found(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Provide the network's ``requires_grad`` flags, and restore them and the training flags on exit."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with modes_kept(model):
            yield wanted
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted.get(name, True))


@contextlib.contextmanager
def structure_kept(model: nn.Module) -> Iterator[None]:
    """Restore the network's structure (not the values of its tensors) if the body raises."""
    fields = ("_modules", "_parameters", "_buffers")
    now = [(module, dict(vars(module)), [dict(getattr(module, f)) for f in fields]) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, own, registered in now:
            vars(module).clear()
            vars(module).update(own)
            for name, content in zip(fields, registered, strict=True):
                getattr(module, name).clear()
                getattr(module, name).update(content)
        raise


def layout_of(value: torch.Tensor, device: torch.device) -> torch.memory_format:
    """Return channels last on CUDA, for tensors with four or five dims; otherwise the format is preserved."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if device.type == "cuda" else {}
    return layouts.get(value.dim(), torch.preserve_format)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move the network; the weights of 2d and 3d convolutions get the device's memory format."""
    model.to(device=device)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if (layout := layout_of(value, device)) is not torch.preserve_format:
                value.data = value.data.to(memory_format=layout)
