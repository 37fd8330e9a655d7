"""What a run keeps on disk, so that it can go on after a kill at any moment.

``last/`` is a folder like ``save_retrofitted`` writes, with two files more: ``training.safetensors`` (the tensors of
optimizer, average and the rest) and ``training.json`` (all else, with the tensors' names in their places). It is
replaced whole or not at all. Random generators are not in it: see ``randomness.py``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, brief
from ..models import Base
from ..plaindata import read_json
from ..saving.atomic import replaced_directory, settled
from ..saving.networks import write_network
from ..saving.recipe import RECIPE, WEIGHTS, check_fields, read_recipe
from ..saving.tensors import load_strictly, read_weights, save_tensors, tie
from .config import FinetuneConfig
from .experiment import check_same
from .groups import group_summary

__all__ = ["LAST", "Progress", "has_checkpoint", "load_training", "save_training", "write_best"]

LAST, BEST = "last", "best"
TENSORS, STATE = "training.safetensors", "training.json"
FORMAT = 2


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: the epoch that is under way, from 0.
        step: updates done in it.
        updates: updates done in all.
        loss, correct, seen: sums over the epoch so far, over all processes.
        history: a row for each finished epoch; row 0 is the evaluation before training.
        best: the best validation accuracy, and in which epoch (from 1).
        stale: epochs in a row that did not bring a better one.
        finished: why the run is over: ``"epochs"`` or ``"early stop"``; None while it is not.
        step_seconds: the median time of an update.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    finished: str | None = None
    step_seconds: float | None = None


PROGRESS_FIELDS: dict[str, tuple[type, ...]] = {
    "epoch": (int,), "step": (int,), "updates": (int,), "loss": (float, int), "correct": (float, int), "seen": (float, int),
    "history": (list,), "best": (float, int, type(None)), "best_epoch": (int, type(None)), "stale": (int,),
    "finished": (str, type(None)), "step_seconds": (float, int, type(None)),
}  # fmt: skip

GATE_FIELDS: dict[str, tuple[type, ...]] = {
    "channels": (list,), "low": (float, int), "high": (float, int), "variation": (float, int), "saturated": (float, int),
}  # fmt: skip


def has_checkpoint(output: Path) -> bool:
    """Whether a run in this folder has something to go on from."""
    folder = settled(output / LAST)
    # Of an incomplete one, reading it says what is missing
    return any((folder / name).is_file() for name in (WEIGHTS, RECIPE, TENSORS, STATE))


def save_training(
    output: Path,
    model: nn.Module,
    progress: Progress,
    config: dict[str, Any],
    experiment: dict[str, Any],
    parts: dict[str, Any],
    *,
    world: int,
    base: Base | None,
) -> None:
    """Write ``last/``: the network, how far the run has come, and the state dicts in ``parts``.

    Raises:
        RetrofitError: it can't be written; the checkpoint before it is untouched.
    """
    tree, tensors = split(parts)
    state = {
        "format": FORMAT, "progress": asdict(progress), "config": config, "experiment": experiment, "world": world,
        "parts": tree,
    }  # fmt: skip
    with replaced_directory(output / LAST, (WEIGHTS, RECIPE, TENSORS, STATE)) as fresh:
        write_network(model, fresh, base=base)
        save_tensors(tensors, fresh / TENSORS)
        (fresh / STATE).write_text(json.dumps(state), encoding="utf-8")


def write_best(output: Path, model: nn.Module, *, base: Base | None) -> None:
    """Write ``best/``, the network that is the run's result."""
    with replaced_directory(output / BEST, (WEIGHTS, RECIPE)) as fresh:
        write_network(model, fresh, base=base)


def load_training(
    output: Path, model: nn.Module, config: dict[str, Any], experiment: dict[str, Any], groups: list[dict[str, Any]], *,
    world: int, free: set[str],
) -> tuple[Progress, dict[str, Any]]:  # fmt: skip
    """Read ``last/``: its weights go into ``model``, the rest is returned.

    Args:
        output: the folder of the run.
        model: the network that the run started with.
        config: of the run that goes on; the saved one must agree but for the fields in ``free``. A run that is over may
            have more epochs now.
        experiment: as ``describe_run`` gives it; the saved one must agree.
        groups: of the optimizer, as ``group_summary`` gives them; the saved ones must agree.
        world: number of processes.
        free: names of config fields that may have changed.

    Raises:
        RetrofitError: the checkpoint is broken, or of another network, experiment, config, number of processes or division of the
            parameters. The model is unchanged.
    """
    folder = settled(output / LAST)
    state = read_json(folder / STATE)
    shape: dict[str, tuple[type, ...]] = {
        "format": (int,), "progress": (dict,), "config": (dict,), "experiment": (dict,), "world": (int,), "parts": (dict,),
    }  # fmt: skip
    check_fields(state, shape, folder / STATE, FORMAT)
    check_fields(state["progress"], PROGRESS_FIELDS, f"{folder / STATE}: progress", FORMAT)
    _check_history(state["progress"]["history"], f"{folder / STATE}: history")
    check_same(state["experiment"], experiment, output)
    # a field that came in a later version had no effect then, which is its default
    then = {**FinetuneConfig().to_dict(), **state["config"]}
    if type(then["epochs"]) is not int:
        raise RetrofitError(f"{folder / STATE}: epochs must be a number, got {brief(then['epochs'])}")
    if state["progress"]["finished"] and config["epochs"] > then["epochs"]:
        free = free | {"epochs"}  # a run that is over may be extended
        state["progress"]["finished"] = None
    changed = [k for k in config if k not in free and then[k] != config[k]]
    if changed:
        what = "; ".join(f"{k}: {then[k]!r} then, {config[k]!r} now" for k in changed)
        raise RetrofitError(
            f"{output} holds a run with another config ({what}); resume with the same, or give a new folder"
        )
    if state["world"] != world:
        raise RetrofitError(
            f"{output} was started with {state['world']} processes, now running with {world}; use {state['world']}"
        )
    recipe = read_recipe(folder)
    weights = read_weights(folder / WEIGHTS)
    tie(weights, recipe["tied"], folder / RECIPE)
    try:
        parts = join(state["parts"], read_weights(folder / TENSORS))
    except (TypeError, ValueError) as error:
        raise RetrofitError(f"{folder / STATE}: parts can't be put together: {error}") from error
    check_groups(parts, groups, output)
    load_strictly(model, weights, str(folder / WEIGHTS))
    return Progress(**state["progress"]), parts


def check_groups(parts: dict[str, Any], groups: list[dict[str, Any]], output: Path) -> None:
    """Raise where another version of this package gave the parameters other learning rates: an optimizer's state goes by their
    order in the groups."""
    try:
        then = group_summary(parts["optimizer"]["param_groups"])
    except (AttributeError, LookupError, TypeError):
        return  # it was edited, which is told when it is loaded
    if then == groups:
        return
    words = [
        ", ".join(f"{g['name']} {g['lr_scale']:.4g} ({g['tensors']} tensors)" for g in found)
        for found in (then, groups)
    ]
    raise RetrofitError(
        f"{output} holds a run whose parameters learn at other parts of lr, as a version of this package before or after this one "
        f"divides them ({words[0]} then; {words[1]} now); finish it with that version, or start anew in another folder"
    )


def _check_history(history: list[Any], where: str) -> None:
    """Raise unless it holds a row of numbers for each epoch, with what ``log_gates`` gives for each site."""
    for row in history:
        check = dict(row) if isinstance(row, dict) else {}
        gates, saturated = check.pop("gates", {}), check.pop("saturated", {})
        numbers = [*check.values(), *(saturated.values() if isinstance(saturated, dict) else [saturated])]
        for seen in gates.values() if isinstance(gates, dict) else [gates]:
            older = {"saturated": 0.0} if isinstance(seen, dict) else {}  # what runs before this version did not note
            check_fields({**older, **seen} if older else seen, GATE_FIELDS, f"{where}: gates")
            numbers += [*seen["channels"], *([] if len(seen["channels"]) == 5 else ["five are expected"])]
        if type(check.get("epoch")) is not int or not all(map(_is_number, numbers)):
            raise RetrofitError(f"{where} must hold a row of numbers for each epoch, got {brief(row)}")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not abs(value) > 2**53)


def check_folders(output: Path) -> None:
    """Raise before training where ``last/`` or ``best/`` hold files that a checkpoint would delete."""
    for part, ours in ((LAST, (WEIGHTS, RECIPE, TENSORS, STATE)), (BEST, (WEIGHTS, RECIPE))):
        folder = output / part
        if folder.exists() and not folder.is_dir():
            raise RetrofitError(f"{folder} is a file, and the run writes a folder there; give another output folder")
        foreign = sorted(f.name for f in folder.iterdir() if f.name not in ours) if folder.is_dir() else []
        if foreign:
            raise RetrofitError(
                f"{folder} holds files of other kinds ({', '.join(foreign[:3])}), which would be lost; "
                "give another output folder"
            )


def load_best(output: Path) -> dict[str, Tensor]:
    """The weights in ``best/``."""
    folder = settled(output / BEST)
    weights = read_weights(folder / WEIGHTS)
    tie(weights, read_recipe(folder)["tied"], folder / RECIPE)
    return weights


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, with each state laid out in memory like its parameter (channels last)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state["state"].items():
        for name, value in entries.items():
            like = parameters[number]
            if isinstance(value, Tensor) and value.shape == like.shape and value.dim() > 1:
                entries[name] = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
    optimizer.load_state_dict(state)


def check_space(output: Path, model: nn.Module, config: Any) -> None:
    """Raise before training, rather than after the first epoch, where the disk has no room for the checkpoints."""
    weights = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    # last: weights, about two of them for the optimizer, one for the average; best: one; twice while it is replaced
    need = weights * (2 * (3 + (config.ema_decay is not None)) + 2)
    # what is there already will be replaced
    there = sum(
        f.stat().st_size for part in (LAST, BEST) if (output / part).is_dir() for f in (output / part).iterdir()
    )
    free = shutil.disk_usage(output).free + there
    if free < need:
        raise RetrofitError(
            f"{output} has {free / 2**20:,.0f} MiB left, and the checkpoints of this run need about "
            f"{need / 2**20:,.0f}; make room or give another folder"
        )


# State dicts (nested dicts, lists, tuples, numbers, tensors) as JSON plus tensors


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nest of state dicts as plain data fit for JSON, and its tensors by name. ``join`` puts it together again.

    Raises:
        TypeError: something in it is neither data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, walk(entry, f"{name}.{key}")] for key, entry in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [walk(entry, f"{name}.{i}") for i, entry in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{name} is a {type(value).__name__}, which can't be stored without pickle")

    return {key: walk(value, key) for key, value in tree.items()}, tensors


def join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``split`` took apart.

    Raises:
        RetrofitError: a tensor is missing, or something unknown stands in the tree.
    """

    def walk(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        (kind, content), *more = value.items()
        if more or kind not in ("tensor", "dict", "list", "tuple"):
            raise RetrofitError(f"the checkpoint holds something unknown: {sorted(value)[:3]}")
        if kind == "tensor":
            if content not in tensors:
                raise RetrofitError(f"the checkpoint has lost the tensor {content}")
            return tensors[content]
        if kind == "dict":
            return {key: walk(entry) for key, entry in content}
        entries = [walk(entry) for entry in content]
        return tuple(entries) if kind == "tuple" else entries

    return {key: walk(value) for key, value in tree.items()}
