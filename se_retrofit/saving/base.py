"""The origin of a network, as found in the network itself, or as given by the caller and checked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RetrofitError, brief
from ..models import LIBRARIES, Base
from ..plan import Site
from ..retrofit import has_se, plan_of
from ..surgery.splice.derived import class_before
from .recipe import RECIPE, belongs_to


def base_of(model: nn.Module) -> tuple[Base | None, str]:
    """Return the base of a network, if the network knows it, or else the reason why it is unknown.

    Networks built by name remember it, and timm's carry the name of their architecture. A rebuilt one must have the
    same layers: some may have been replaced since, and arguments such as ``output_stride`` don't show in timm's name.
    """
    note = f"{type(model).__module__}.{type(model).__qualname__} does not tell the name that it was built by"
    for base in (Base.noted(model), _told_by_timm(model)):
        if base is not None:
            problem = _mismatch(base, model)
            if not problem:
                return base, ""
            note = f"{base} with {base.kwargs} is another network than the one that was saved: {problem}"
    return None, note


def _told_by_timm(model: nn.Module) -> Base | None:
    """Return what timm has noted in its network: architecture, tag of the weights, numbers of classes and channels."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not name or not isinstance(config, dict):
        return None
    if config.get("tag"):  # the tag brings the mean, std and size that the weights were trained with
        name = f"{name}.{config['tag']}"
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    first = config.get("first_conv")
    weight = model.state_dict().get(f"{first}.weight") if isinstance(first, str) else None
    if weight is not None and weight.dim() > 1 and weight.shape[1] != config.get("input_size", (3,))[0]:
        kwargs["in_chans"] = weight.shape[1]
    return Base("timm", name, kwargs)


def named_base(recipe: dict[str, Any], folder: Path) -> Base | None:
    """Return the base that a recipe names, or None if it names none. A folder may come from anybody, so only the
    libraries' own networks and arguments for their architecture are allowed: nothing else is read, downloaded or run.
    """
    named = recipe["base"]
    if named is None:
        return None
    try:
        if named["library"] not in LIBRARIES:
            raise RetrofitError(f"no library {brief(named['library'])}; there are {' and '.join(LIBRARIES)}")
        return Base.listed(f"{named['library']}/{named['name']}", named["kwargs"])
    except RetrofitError as error:
        hint = ""
        if ":" in named["name"]:
            hint = (
                f"; if you trust what is there, give it yourself, load_retrofitted(directory, base={brief(named['name'])}), "
                "and save the network again"
            )
        raise RetrofitError(f"the base network that {folder / RECIPE} names can't be built: {error}{hint}") from error


def check_base(model: nn.Module, base: Base) -> None:
    """Raise an error unless ``base`` builds ``model`` without its SE."""
    if not isinstance(base, Base):
        raise TypeError(f"base must be a name such as 'timm/resnet18', or a Base, got {brief(base)}")
    if problem := _mismatch(base, model):
        raise RetrofitError(
            f"base={base!r} does not build the network that is to be saved: {problem}; give the name and the arguments "
            "that it was built by, such as Base.of('torchvision/resnet18', num_classes=10)"
        )


def _mismatch(base: Base, model: nn.Module) -> str:
    """Describe how the network that ``base`` builds differs from ``model`` without its SE; empty if it doesn't."""
    sites = plan_of(model).sites if has_se(model) else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                with torch.device("meta"):  # costs neither time nor memory
                    other = base.build()
            except RuntimeError:  # a network whose constructor computes with tensors
                other = base.build()
        except Exception as error:
            return f"it can't be built: {error}"
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if not belongs_to(k, sites)}
    theirs = {k: tuple(v.shape) for k, v in other.state_dict().items()}
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            return f"{key} has shape {ours.get(key, 'none')} in the network and {theirs.get(key, 'none')} in the base"
    own, rebuilt = _layers(model, sites), _layers(other, ())
    for path in [*own, *rebuilt]:
        if own.get(path) != rebuilt.get(path):
            return f"{path} is {own.get(path, 'none')} in the network and {rebuilt.get(path, 'none')} in the base"
    return ""


def _layers(model: nn.Module, sites: tuple[Site, ...]) -> dict[str, str]:
    """Return each layer (module without children of its own) as text, except dropout, because its rate is not saved."""
    return {
        path: f"{class_before(module).__name__}({module.extra_repr()})"
        for path, module in model.named_modules()
        if all(belongs_to(f"{path}.{name}", sites) for name, _ in module.named_children())  # a ReLU may hold SE
        and not isinstance(module, nn.Identity)
        and not type(module).__name__.startswith(("Drop", "StochasticDepth"))
        and not belongs_to(path, sites)
    }
