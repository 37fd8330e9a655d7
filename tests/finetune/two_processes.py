"""Several fine-tunes in two processes that are started once: ``torchrun --nproc_per_node=2 two_processes.py FOLDER``.

FOLDER/one holds a run of a single process. Each process writes into FOLDER/told.RANK.json what was raised.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import network, tiny_data, trained
from torch import nn

from se_retrofit.finetune import Callbacks, Facts, FinetuneResult
from se_retrofit.finetune.log import Log

# With frozen statistics and nothing random in the network two processes compute what one does, to rounding
RECIPE = {
    "epochs": 2, "freeze_bn": True, "optimizer": "sgd", "lr": 0.005,
    "clip_grad": None,  # clipping would hide a wrong factor
    "grad_accum_steps": 2, "patience": 2,
}  # fmt: skip
# All that has state, is random or differs between processes
DEMANDING = {
    "epochs": 2, "batch_size": 8, "grad_accum_steps": 2, "mixup": 0.4, "ema_decay": 0.9, "checkpoint_minutes": 0.0, "trainable": "se+head",
    "unfreeze_epoch": 2,
}  # fmt: skip


class Broken(Exception):
    pass


def break_off(facts: Facts) -> None:
    if facts.update == 3:  # of four
        raise Broken


def train(
    folder: Path, fields: dict[str, Any], model: nn.Module | None = None, images: int = 128, **options: Any
) -> FinetuneResult:
    return trained(model or network(), tiny_data(images, 50), recipe=fields, output_dir=folder, **options)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    Log.pictures = lambda *_: None  # type: ignore[method-assign]
    told: dict[str, str] = {}

    def refused(name: str, *args: Any, **options: Any) -> None:
        try:
            train(*args, **options)
            told[name] = ""
        except (Broken, ValueError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    train(root / "two", {**RECIPE, "batch_size": 8}, quiet=False)
    few = {"images": 64}
    train(root / "whole", DEMANDING, **few)
    refused("broken", root / "broken", DEMANDING, **few, callbacks=Callbacks(after_update=break_off))
    train(root / "broken", DEMANDING, **few, resume=True)
    refused("other number", root / "one", {**RECIPE, "batch_size": 16}, resume=True)
    for name, changes in (("told of unused", {"find_unused_parameters": True}), ("unused", {})):
        model = network()
        model.unused = nn.Linear(2, 2)
        refused(name, root / name, {"batch_size": 8, **changes}, model, **few)
    (root / f"told.{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
