"""The recipe of a saved network, read and changed, and the tensors of two networks, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def recipe_of(folder: Path) -> Any:
    return json.loads((folder / "recipe.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "recipe.json").write_text(json.dumps({**recipe_of(folder), **changes}))


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []
