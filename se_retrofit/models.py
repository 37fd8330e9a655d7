"""Networks by name: ``resnet50``, ``timm/resnet50``, ``torchvision/resnet50``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from .errors import RetrofitError

__all__ = ["Base", "load_checkpoint"]

LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True)
class Base:
    """Where a network comes from: a library, a name in it, and the arguments it is built with.

    Example:
        >>> from se_retrofit.models import Base
        >>> base = Base.of("timm/resnet18", num_classes=10)
        >>> type(base.build()).__name__
        'ResNet'
    """

    library: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, **kwargs: Any) -> Base:
        """Read ``name``: a library and a model with a slash between, or a model alone, looked for in timm, then
        in torchvision.

        Raises:
            RetrofitError: neither library has a model of that name; the message lists close names.
        """
        library, _, model = name.rpartition("/")
        libraries = (library,) if library else LIBRARIES
        if library and library not in LIBRARIES:
            # timm's own prefixes (hf-hub:owner/name, local-dir:path) hold slashes
            if name.split(":")[0] in ("hf-hub", "hf_hub", "local-dir"):
                return cls("timm", name, kwargs)
            raise RetrofitError(f"no library {library!r} in {name!r}; give timm/NAME or torchvision/NAME")
        for candidate in libraries:
            if _knows(candidate, model):
                return cls(candidate, model, kwargs)
        names = [n for lib in libraries for n in _names(lib)]
        close = difflib.get_close_matches(model, names, n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise RetrofitError(f"no model {model!r} in {' or '.join(libraries)}{hint}")

    def build(self, pretrained: bool = False) -> nn.Module:
        """The network, with random weights or, where ``pretrained``, the library's own (downloaded by it)."""
        if self.library == "timm":
            return timm.create_model(self.name, pretrained=pretrained, **self.kwargs)
        kwargs = dict(self.kwargs)
        if pretrained:
            kwargs["weights"] = "DEFAULT"
        else:
            kwargs.setdefault("weights", None)
            # the detection and segmentation builders fetch a pretrained backbone unless told otherwise
            if "backbone" in _signature(self.name):
                kwargs.setdefault("weights_backbone", None)
        return torchvision.models.get_model(self.name, **kwargs)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of the bare network, ``.safetensors`` or a state dict by ``torch.save``, strictly.

    Raises:
        RetrofitError: there is no such file, it can't be read, or its keys don't fit; the model is unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise RetrofitError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RetrofitError(f"{path} can't be read as a checkpoint: {error}") from error
    for wrapper in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise RetrofitError(f"{path} holds no state dict (a mapping of names to tensors)")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    problems = [f"{what}: {_few(keys)}" for what, keys in
                (("missing", missing), ("unexpected", unexpected), ("other shapes", reshaped)) if keys]
    if problems:
        raise RetrofitError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)


def _few(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _names(library: str) -> list[str]:
    return timm.list_models() if library == "timm" else torchvision.models.list_models()


def _knows(library: str, name: str) -> bool:
    if library == "timm":
        return bool(timm.is_model(name))
    return name.lower() in torchvision.models.list_models()


def _signature(name: str) -> str:
    import inspect

    return str(inspect.signature(torchvision.models.get_model_builder(name)))
