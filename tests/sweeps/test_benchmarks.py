"""The script for a GPU runs without one, in a reduced form, so that it is not found broken where the GPU is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- on_cuda.py: begin -->", "<!-- on_cuda.py: end -->"
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "on_cuda.py"), "--device", "cpu", "--small", "--page"]


@pytest.mark.sweep
def test_the_script_for_a_gpu_runs_on_a_cpu_and_writes_its_section(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    done = subprocess.run([*SCRIPT, str(page)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, rest = page.read_text().split(BEGIN)
    section, after = rest.split(END)
    assert (before, after) == ("before\n\n", "\n\nafter\n")
    assert "old" not in section
    assert section.count("fused |") == 2  # in training and in inference
    for said in (
        "The tests marked `cuda`:",
        "native SE",
        "images/s. Stopped after one epoch",
        "of a bare PyTorch loop",
    ):
        assert said in section
    assert "no weight is further than 0 from" in section


@pytest.mark.sweep
def test_a_page_without_the_markers_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    done = subprocess.run([*SCRIPT, str(page)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "must have the lines" in done.stderr
    assert page.read_text() == "no markers"
