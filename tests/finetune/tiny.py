"""A network and data small enough to be trained in a test, and in the processes that tests start."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import narrow_resnet
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from se_retrofit import add_se
from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, FinetuneResult, NamedData, finetune, load_data
from se_retrofit.finetune.log import Log

IMAGES, VALIDATED, BATCH = 128, 50, 16  # eight updates an epoch
# the length of a run changes no learning rate
RECIPE = {"ema_decay": 0.9, "schedule": "constant", "warmup_ratio": 0.0}
TESTS = Path(__file__).parents[1]
PLACES = [TESTS / "finetune", TESTS / "helpers", TESTS.parent, os.environ.get("PYTHONPATH", "")]
# of the programs that tests start
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(map(str, PLACES))
}  # fmt: skip


def torchrun() -> list[str]:
    """The beginning of a command that starts two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [sys.executable, *launcher]


class Finished(NamedTuple):
    """A run that is over; ``said`` are the lines that it printed."""

    folder: Path
    config: FinetuneConfig
    result: FinetuneResult
    said: list[str]


def network(se: bool = True, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A residual network of 4 blocks, with norms that are not at their first values."""
    return copy.deepcopy(made(se, seed, **kwargs))


@functools.cache
def made(se: bool, seed: int, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = narrow_resnet(**kwargs).train()
        return add_se(model) if se else model


def classifier(inputs: int, outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


@functools.cache
def digits(train: int = IMAGES, val: int = VALIDATED) -> NamedData:
    data = load_data("digits", image_size=16)
    return NamedData(Subset(data.train, range(train)), Subset(data.val, range(val)), 10)


class Items(Dataset[Any]):
    """Whose items come from a function."""

    def __init__(self, length: int, item: Callable[[int], Any]) -> None:
        self.length, self.item = length, item

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def config(**changes: Any) -> FinetuneConfig:
    fields = {"epochs": 1, "batch_size": BATCH, "lr": 1e-3, "workers": 0, "log_every": 1, "cpu": True}
    return FinetuneConfig(**{**fields, **changes})


def trained(
    model: nn.Module | None = None,
    data: Any = None,
    val: Any = None,
    recipe: dict[str, Any] | None = None,
    **options: Any,
) -> FinetuneResult:
    """A quiet fine-tune of the network on the digits, or of another one, or on other data; by a recipe of these fields."""
    data = digits() if data is None else data
    train, val = (data.train, data.val) if isinstance(data, NamedData) else (data, val)
    model = network() if model is None else model
    return finetune(model, train, val, config=config(**(recipe or {})), **{"quiet": True, **options})


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def progress_in(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "last" / "training.json").read_text())["progress"])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def breaking(update: int) -> Callbacks:
    """They end the run at this update by an error, and as a kill would: nothing is tidied up on the disk."""

    def check(facts: Facts) -> None:
        if facts.update == update:
            raise ZeroDivisionError

    return Callbacks(after_update=check)


def run_saying(said: Path, output: Path, fields: dict[str, Any]) -> None:
    """Resume, with what is printed in a file: for processes of a fork server, which has done the imports."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # or the loading processes would come from another fork server, which has done no imports
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    Log.pictures = lambda *_: None  # type: ignore[method-assign]
    trained(recipe=fields, output_dir=output, resume=True, quiet=False)
