"""A fine-tune for the tests that kill processes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from tiny import trained

from se_retrofit.finetune.log import Log


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
