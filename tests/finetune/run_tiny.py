"""A fine-tune for the tests that need a process of its own: ``python run_tiny.py OUTPUT FIELDS [resume] [loader]``.

``unused`` among the flags: a network with a layer that its forward does not call.
SE_TEST_DIE_AT: the update after which the process kills itself. SE_TEST_ENDS: a folder in which each process notes how it ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config, tiny_data, tiny_network
from torch import nn

from se_retrofit.finetune import finetune


def die_at(model: nn.Module, update: int, batches: int) -> None:
    forwards = []

    def count(module: nn.Module, inputs: object) -> None:
        forwards.append(module.training)
        if sum(forwards) == update * batches + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)


def run(output: str, fields: dict[str, Any], flags: Sequence[str] = ()) -> None:
    torch.set_num_threads(1)
    data, model, config = tiny_data(), tiny_network(), tiny_config(**fields)
    if "SE_TEST_DIE_AT" in os.environ:
        die_at(model, int(os.environ["SE_TEST_DIE_AT"]), config.grad_accum_steps)
    if "unused" in flags:
        model.unused = nn.Linear(2, 2)
    try:
        finetune(model, data.train, data.val, config=config, output_dir=output, resume="resume" in flags)
    except BaseException as error:
        if "SE_TEST_ENDS" in os.environ:
            (Path(os.environ["SE_TEST_ENDS"]) / os.environ["RANK"]).write_text(repr(error))
        raise


def run_saying(said: Path, output: Path, fields: dict[str, Any]) -> None:
    """Resume, with what is printed in a file: for processes of a fork server, which has done the imports."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # or the loading processes would come from another fork server, which has done no imports
    multiprocessing.set_start_method("fork", force=True)
    run(str(output), fields, ["resume"])


if __name__ == "__main__":
    output, fields, *flags = sys.argv[1:]
    run(output, json.loads(fields), flags)
