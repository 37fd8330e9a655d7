"""``se-retrofit timm SCRIPT ...``: run timm's own scripts with retrofitted networks available by name."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app

HELP = """
Run a timm script (train.py, validate.py, benchmark.py) with retrofitted networks available by name.

Each timm architecture is registered a second time with the prefix `se_retrofit_` and the same pretrained tags.
Options of the retrofit are model arguments that start with `se_`.

Examples:

- `se-retrofit timm train.py --data-dir DATA --model se_retrofit_resnet50.a1_in1k --pretrained`
- `se-retrofit timm train.py --data-dir DATA --model se_retrofit_resnet50 --model-kwargs se_reduction=16`
- `torchrun --nproc_per_node=4 --no-python se-retrofit timm train.py --data-dir DATA --model se_retrofit_resnet50`
"""

# all arguments after the script are passed on to it
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@app.command("timm", help=HELP, context_settings=OPEN)
def timm_command(
    context: typer.Context,
    script: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="a script of a timm checkout, or your own")
    ],
) -> None:
    from ..models import register_timm

    register_timm()
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))  # as for `python SCRIPT`
    runpy.run_path(str(script), run_name="__main__")
