"""When all names were last walked: on which commit, with which versions, and what has changed since."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision

ROOT = Path(__file__).parents[2]
UNKNOWN = "unknown"
# what decides where SE goes in a network; a path may be missing on one side of a comparison
SURGERY = (
    "se_retrofit/surgery", "se_retrofit/attention", "se_retrofit/attention.py", "se_retrofit/plan.py",
    "se_retrofit/retrofit.py", "tools/zoo/check.py", "tools/zoo/names.py",
)  # fmt: skip


@dataclass(frozen=True)
class FullRun:
    """A walk over all names.

    Attributes:
        commit: that was checked out, ``"unknown"`` where git could not tell.
        versions: of the libraries, e.g. ``"timm 1.0.31, torchvision 0.29.2, torch 2.15.0"``.
    """

    commit: str
    versions: str

    def __str__(self) -> str:
        return f"Last run in full on commit {self.commit} with {self.versions}."


WRITTEN = re.compile(r"^Last run in full on commit (\w+) with (.+)\.$", re.MULTILINE)


def read_run(page: str) -> FullRun | None:
    """The run that a page of tables names, if it names one."""
    found = WRITTEN.search(page)
    return FullRun(*found.groups()) if found else None


def present_run() -> FullRun:
    """A run as it would be now: on the commit that is checked out, with the versions that are installed."""
    libraries = ("timm", timm.__version__), ("torchvision", torchvision.__version__), ("torch", torch.__version__)
    versions = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in libraries)
    return FullRun(_git(ROOT, "rev-parse", "--short=12", "HEAD") or UNKNOWN, versions)


def changed_since(commit: str, root: Path = ROOT) -> list[str] | None:
    """The files of the surgery that differ from those of a commit; None where git can't tell.

    It can't where there is no git or no repository, and in a shallow clone that lacks the commit.
    """
    changed = _git(root, "diff", "--name-only", commit, "--", *SURGERY)
    return None if changed is None else changed.splitlines()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
