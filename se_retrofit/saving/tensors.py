"""Saving and loading state dicts as safetensors files: tied tensors are stored once, keys and shapes are checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoints import check_keys
from ..errors import RetrofitError
from ..surgery.record.copying import check_values


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, which must hold only tensors with values."""
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise RetrofitError(f"{key} in the state dict is a {type(value).__name__}; only tensors can be saved")
    check_values(state.items())
    for key, value in state.items():
        if is_traceable_wrapper_subclass(value):
            raise RetrofitError(
                f"{key} is a {type(value).__name__} (quantised by torchao, say), which safetensors can't store; save the network "
                "as it was before, and quantise what is loaded"
            )
    return state


def untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, and the other names of the same tensors: ``(tensors, {name: kept name})``."""
    kept: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        identity = (*place, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in kept:
            tied[name] = kept[identity]
        else:
            kept[identity] = name
            stored[name] = tensor
    return stored, tied


def tie(state: dict[str, Tensor], tied: dict[str, str], where: object) -> None:
    """Put each tensor that ``untied`` left out back into ``state``."""
    for name, kept in tied.items():
        if kept not in state:
            raise RetrofitError(f"{where}: {name} is tied to {kept}, which the weights do not hold")
        state[name] = state[kept]


def write_tensors(tensors: dict[str, Tensor], path: Path, meta: dict[str, str]) -> None:
    # Partly overlapping views of one storage are written separately, hence the clone.
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    ready = {}
    for name, tensor in tensors.items():
        shared = owners[tensor.untyped_storage().data_ptr()] > 1
        tensor = tensor.detach().contiguous()
        ready[name] = tensor.clone() if shared else tensor
    save_tensors(ready, path, meta)


def save_tensors(tensors: dict[str, Tensor], path: Path, meta: dict[str, str] | None = None) -> None:
    """Call ``safetensors.torch.save_file``, but raise system errors as OSErrors, and set the usual file permissions."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=meta)
    except SafetensorError as error:
        # it wraps system errors, such as a full disk
        raise OSError(str(error)) from error
    path.chmod(mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or raise a ``RetrofitError`` that says what is wrong with it."""
    if not path.is_file():
        raise RetrofitError(f"no file {path}")
    try:
        return dict(load_file(path))
    except Exception as error:  # besides errors of its own, safetensors passes on those of torch
        raise RetrofitError(f"{path} can't be read as safetensors, it may be cut short: {error}") from error


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load every tensor with its own dtype. If keys or shapes differ, or the model has a tensor without values, which
    load_state_dict would leave so, an error is raised and the model is unchanged."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RetrofitError(
                f"{where} can't be loaded: {name} of the network is on the meta device; build it on another one, outside "
                'of torch.device("meta")'
            )
    check_keys(model.state_dict(), state, where)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(state)
