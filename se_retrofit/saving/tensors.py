"""State dicts as safetensors files, and back: tied tensors once, dtypes kept, keys and shapes checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoints import check_keys
from ..errors import RetrofitError
from ..surgery.record.copying import check_values

__all__ = [
    "load_strictly",
    "read_weights",
    "retype",
    "save_tensors",
    "tensors_of",
    "tie",
    "untied",
    "write_tensors",
]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, which must hold tensors that have values."""
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise RetrofitError(f"{key} in the state dict is a {type(value).__name__}; only tensors can be saved")
    check_values(state.items())
    return state


def untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which names stand for the same tensor: ``(tensors, {name: kept name})``."""
    kept: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        identity = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
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
    # Views of one storage that overlap in part are written each on its own, hence the clone.
    owners: dict[int, int] = {}
    for tensor in tensors.values():
        owners[tensor.untyped_storage().data_ptr()] = owners.get(tensor.untyped_storage().data_ptr(), 0) + 1
    ready = {}
    for name, tensor in tensors.items():
        shared = owners[tensor.untyped_storage().data_ptr()] > 1
        ready[name] = (
            tensor.detach().clone(memory_format=torch.contiguous_format) if shared else tensor.detach().contiguous()
        )
    save_tensors(ready, path, meta)


def save_tensors(tensors: dict[str, Tensor], path: Path, meta: dict[str, str] | None = None) -> None:
    """``safetensors.torch.save_file``, with the system's errors as such and the usual permissions."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=meta)
    except SafetensorError as error:
        # it wraps the system's errors, a full disk among them
        raise OSError(str(error)) from error
    path.chmod(mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a ``RetrofitError`` that says what is wrong with it."""
    if not path.is_file():
        raise RetrofitError(f"no file {path}")
    try:
        return dict(load_file(path))
    except Exception as error:  # beside its own, safetensors lets through what torch raises
        raise RetrofitError(f"{path} can't be read as safetensors, it may be cut short: {error}") from error


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load every tensor with its own dtype; raise, with the model unchanged, unless keys and shapes agree."""
    check_keys(model.state_dict(), state, where)
    retype(model, state)
    model.load_state_dict(state)


def retype(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give parameters and buffers the dtypes of ``state``: a network that was saved in bfloat16 comes back in it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)
