"""Raw results: one JSON line for each run, found again by all that the run depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

VERSION = 1  # raise it when a run of the same description computes something else: older results are then left aside


class Results:
    """The runs that are done, in a file to which several processes may append.

    Args:
        path: a JSONL file; it is made where it is missing. A line that was cut short by a kill is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if row["run"].get("version") == VERSION:
                    self.done[_key(row["run"])] = row

    def __contains__(self, run: Mapping[str, Any]) -> bool:
        return _key(_full(run)) in self.done

    def __getitem__(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """What came of a run."""
        outcome: dict[str, Any] = self.done[_key(_full(run))]["outcome"]
        return outcome

    def add(self, run: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        row = {"run": _full(run), "outcome": dict(outcome)}
        self.done[_key(row["run"])] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), self.path.open("a+b") as file:
            # a line that a kill has cut short would swallow the next
            if file.tell() and self.path.read_bytes()[-1:] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(row, sort_keys=True).encode() + b"\n")


def _full(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**run, "version": VERSION}


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
