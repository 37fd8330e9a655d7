"""Reading checkpoints of bare networks, comparing them with the network key by key, and loading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from .errors import RetrofitError
from .surgery.splice.ways import SE_NAME
from .tables import few

FIRST = 3  # number of pairs that an error shows


def load_checkpoint(model: nn.Module, path: str | Path, *, remap: Literal["order"] | None = None) -> None:
    """Load a checkpoint of the bare network into it, strictly.

    Reads ``.safetensors`` files and files written by ``torch.save`` (without unpickling code): a state dict, or a dict
    that contains one as ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model``, in this order. Prefixes added
    by DistributedDataParallel and torch.compile are dropped.

    Args:
        model: the network; it is changed only if everything fits.
        path: the file.
        remap: ``"order"`` for a checkpoint whose keys have other names: its tensors are matched with those of the
            network in order, and must have the same shapes (batch counters aside). Only ``torch.save`` keeps an order.

    Raises:
        RetrofitError: If there is no such file, it can't be read, or its keys or shapes don't fit. The model is
            unchanged then.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from se_retrofit.models import load_checkpoint
        >>> file = Path(tempfile.mkdtemp()) / "weights.pth"
        >>> torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, file)
        >>> load_checkpoint(torch.nn.Linear(2, 2), file)
        >>> load_checkpoint(torch.nn.Linear(2, 2, bias=False), file)
        Traceback (most recent call last):
            ...
        se_retrofit.errors.RetrofitError: weights.pth does not fit the network; unexpected: bias
    """
    path = Path(path)
    if path.is_dir():
        raise RetrofitError(
            f"{path} is a folder, and a checkpoint is a file; a network that save_retrofitted or a fine-tune wrote is loaded by "
            "load_retrofitted, and on the command line its folder goes in MODEL's place"
        )
    if not path.is_file():
        raise RetrofitError(f"no checkpoint file {path}")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors raise a dozen types between them
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RetrofitError(f"{path} can't be read as a checkpoint: {reason}") from error
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise RetrofitError(f"{path} does not hold a state dict (a mapping of names to tensors)")
    own = model.state_dict()
    unexpected = sorted(state.keys() - own.keys())
    hint = ""
    if any(SE_NAME in key.split(".") for key in unexpected):
        hint = ". It holds SE: give its folder to load_retrofitted, or in MODEL's place on the command line"
    renamed = own.keys() - state.keys() and unexpected and not hint
    if renamed or (remap == "order" and own.keys() != state.keys()):
        pairs, hint = by_order(own, state, path)
        if remap == "order" and pairs:
            state = {**own, **{ours: state[theirs] for theirs, ours in pairs}}
    check_keys(own, state, path.name, hint)
    model.load_state_dict(state)


def by_order(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> tuple[list[tuple[str, str]], str]:
    """Pair the keys of a file and of a network in order; return the pairs (none if they don't fit) and a remark."""
    # Only a batch norm's batch counter is an integer; older and converted checkpoints lack it
    theirs, ours = ([k for k, t in tensors.items() if t.dim() or t.is_floating_point()] for tensors in (state, own))
    if path.suffix == ".safetensors":
        return [], ". A .safetensors file does not keep the order of its tensors, by which others could be told"
    pairs = list(zip(theirs, ours, strict=False))
    others = [pair for pair in pairs if pair[0] != pair[1]] or pairs
    told = f". In order, its keys and those of the network are {_told(others[:FIRST], own, state)}, ..."
    wrong = [pair for pair in pairs if state[pair[0]].shape != own[pair[1]].shape]
    if wrong:
        return [], f"{told}, but pair {pairs.index(wrong[0]) + 1} has other shapes: {_told(wrong[:1], own, state)}"
    if len(theirs) != len(ours):
        return [], f"{told}, but there are {len(theirs)} of them in the file and {len(ours)} in the network"
    return pairs, f'{told}; all {len(pairs)} shapes fit: remap="order" loads them so'


def _told(pairs: Iterable[tuple[str, str]], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{a} {tuple(state[a].shape)} and {b} {tuple(own[b].shape)}" for a, b in pairs)


def check_keys(own: dict[str, Any], state: dict[str, torch.Tensor], where: str, hint: str = "") -> None:
    """Raise an error unless both state dicts have the same keys and shapes."""
    problems = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "other shapes": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape},
    }
    told = [f"{what}: {few(sorted(keys))}" for what, keys in problems.items() if keys]
    if told:
        raise RetrofitError(f"{where} does not fit the network; {'; '.join(told)}{hint}")
