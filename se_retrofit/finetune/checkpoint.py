"""The files from which a run can resume after being killed at any moment.

``last/`` is a folder as written by ``save_retrofitted``, with two more files: ``training.safetensors`` (the tensors of
the optimizer, the moving average and so on) and ``training.json`` (everything else, with names in place of tensors). It
is replaced as a whole or not at all. It does not hold the state of random generators: see ``randomness.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..errors import RetrofitError, brief
from ..plaindata import read_json, read_yaml
from ..saving.atomic import check_replaceable, replaced_directory, settled, write_text
from ..saving.networks import write_network
from ..saving.recipe import RECIPE, WEIGHTS, read_fields, read_recipe
from ..saving.tensors import load_strictly, read_weights, save_tensors, tie
from .config import FinetuneConfig
from .experiment import check_same
from .log import METRICS

LAST, BEST, RUN = "last", "best", "run.yaml"
TENSORS, STATE = "training.safetensors", "training.json"
FORMAT = 4
# These may differ when a run is resumed; all other fields decide the result.
FREE_FIELDS = {"workers", "checkpoint_minutes", "trackers", "bad_images"}


@dataclass
class Progress:
    """The progress of a run; ``loss``, ``correct`` and ``seen`` are sums over the epoch so far, over all processes."""

    epoch: int = 0  # the current one, from 0
    step: int = 0  # number of updates in it
    updates: int = 0  # in total
    loss: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each epoch; row 0 is before training
    best: float | None = None  # the best validation score
    best_epoch: int | None = None  # from 1
    stale: int = 0  # number of epochs since then
    finished: str | None = None  # "epochs", "updates" or "early stop"; None while the run goes on
    step_seconds: float | None = None  # the median time of an update


@dataclass
class State:
    """The content of ``training.json``; ``parts`` holds the state dicts with names in place of tensors."""

    format: int
    progress: Progress
    config: dict[str, Any]
    experiment: dict[str, Any]
    parts: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The folder of a run, which is identified by its config and its experiment (from ``describe_run``)."""

    path: Path
    config: FinetuneConfig
    experiment: dict[str, Any]

    @property
    def last(self) -> Path:
        return self.path / LAST

    @property
    def best(self) -> Path:
        return self.path / BEST

    def save(self, model: nn.Module, progress: Progress, parts: dict[str, Any]) -> None:
        """Write ``last/``: the network, the progress of the run, and the state dicts in ``parts``."""
        tree, tensors = split(parts)
        state = State(FORMAT, progress, self.config.to_dict(), self.experiment, tree)
        with replaced_directory(self.last, (WEIGHTS, RECIPE, TENSORS, STATE)) as fresh:
            write_network(model, fresh)
            save_tensors(tensors, fresh / TENSORS)
            (fresh / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")

    def save_best(self, model: nn.Module) -> None:
        """Write ``best/``, the network that is the result of the run."""
        with replaced_directory(self.best, (WEIGHTS, RECIPE)) as fresh:
            write_network(model, fresh)

    def load(self, model: nn.Module) -> tuple[Progress, dict[str, Any]]:
        """Load the weights in ``last/`` into ``model``, and return the progress and the state dicts; all or nothing."""
        folder = settled(self.last)
        state: State = read_fields(read_json(folder / STATE), State, f"{folder / STATE}: state", FORMAT)
        self._check_config(state)  # first, because the parameter groups, for example, follow from it
        check_same(state.experiment, self.experiment, self.path)
        weights = self._weights(folder)
        try:
            parts = join(state.parts, read_weights(folder / TENSORS))
        except (KeyError, TypeError, ValueError) as error:
            raise RetrofitError(f"{folder / STATE}: parts can't be put together: {error}") from error
        load_strictly(model, weights, str(folder / WEIGHTS))
        return state.progress, parts

    def load_best(self) -> dict[str, Tensor]:
        return self._weights(settled(self.best))

    def begin(self, command: dict[str, Any] | None, *, resumed: bool) -> None:
        """Write the files that a run starts with; ``run.yaml`` is enough to repeat it."""
        write_text(self.path / "config.yaml", self.config.to_yaml())
        file, config = self.path / RUN, self.config.to_dict()
        content = {"command": command, "experiment": self.experiment, "config": config}
        if resumed and command is None:  # keep the one that started the run
            content = {**content, **written(file), "config": config}
        write_text(file, yaml.safe_dump(content, sort_keys=False))

    def _weights(self, folder: Path) -> dict[str, Tensor]:
        weights = read_weights(folder / WEIGHTS)
        tie(weights, read_recipe(folder)["tied"], folder / RECIPE)
        return weights

    def _check_config(self, state: State) -> None:
        """Raise an error if the run had another config. Extending a finished run makes it unfinished again."""
        now, free = self.config.to_dict(), FREE_FIELDS
        # a field added in a later version had no effect then, so it had its default
        then = {**FinetuneConfig().to_dict(), **state.config}
        if type(then["epochs"]) is not int:
            raise RetrofitError(f"{self.last / STATE}: epochs must be a number, got {brief(then['epochs'])}")
        if state.progress.finished not in (None, "updates") and now["epochs"] > then["epochs"]:
            free = free | {"epochs"}
            state.progress.finished = None
        changed = [k for k in now if k not in free and then[k] != now[k]]
        if changed:
            what = "; ".join(f"{k}: {then[k]!r} then, {now[k]!r} now" for k in changed)
            raise RetrofitError(
                f"{self.path} holds a run with another config ({what}); resume with the same, or give a new folder"
            )


def check_folder(path: Path, resume: bool) -> None:
    """Create a folder if it is missing, and raise an error unless a run may start in it, or resume with ``resume``."""
    begun, result = has_checkpoint(path), (settled(path / BEST) / RECIPE).is_file()
    if result and not begun and has_epochs(path / METRICS):  # there are none if the first epoch was killed
        raise RetrofitError(
            f"{path} holds the result of a run in {BEST}/, but no {LAST}/ to go on from; give another folder, in which a new run "
            "does not replace it"
        )
    if (begun or result) and not resume:
        raise RetrofitError(f"{path} already holds a run; resume it (resume=True), or give another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RetrofitError(f"{path} can't be made: {error.strerror or error}") from error
    check_replaceable(path / LAST, (WEIGHTS, RECIPE, TENSORS, STATE))
    check_replaceable(path / BEST, (WEIGHTS, RECIPE))


def has_checkpoint(path: Path) -> bool:
    """Return whether a run in this folder has a checkpoint to resume from."""
    folder = settled(path / LAST)
    # An incomplete checkpoint counts: reading it reports what is missing
    return any((folder / name).is_file() for name in (WEIGHTS, RECIPE, TENSORS, STATE))


def has_epochs(file: Path) -> bool:
    """Return whether a ``metrics.jsonl`` records a finished epoch."""
    try:
        return any(json.loads(line)["epoch"] for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, LookupError, TypeError, ValueError):
        return False


def written(file: Path) -> dict[str, Any]:
    """Return the content of a ``run.yaml``; empty if it is missing or broken."""
    try:
        content = read_yaml(file)
    except RetrofitError:
        return {}
    return content if isinstance(content, dict) else {}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Call ``optimizer.load_state_dict`` with each state in the memory format of its parameter (channels last). How the
    optimizer computes (``fused``) depends on this machine, and not on the one that wrote the checkpoint."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        saved.update({name: group[name] for name in ("fused", "foreach", "capturable") if name in group})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state["state"].items():
        for name, value in entries.items():
            like = parameters[number]
            if isinstance(value, Tensor) and value.shape == like.shape and value.dim() > 1:
                entries[name] = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
    optimizer.load_state_dict(state)


# State dicts (nested dicts, lists, tuples, numbers, tensors) as JSON plus tensors

KINDS: dict[str, Any] = {"tuple": tuple, "list": list, "dict": dict}


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state dicts into plain data for JSON and tensors by name; anything else raises a TypeError."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[key, walk(entry, f"{name}.{key}")] for key, entry in value.items()]}
        for kind in ("tuple", "list"):
            if isinstance(value, KINDS[kind]):
                return {kind: [walk(entry, f"{name}.{i}") for i, entry in enumerate(value)]}
        raise TypeError(f"{name} is a {type(value).__name__}, which can't be stored without pickle")

    return {key: walk(value, key) for key, value in tree.items()}, tensors


def join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuild the state dicts that ``split`` took apart; raises a KeyError, TypeError or ValueError if it can't."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        return tensors[content] if kind == "tensor" else KINDS[kind](walk(content))

    return {key: walk(value) for key, value in tree.items()}
