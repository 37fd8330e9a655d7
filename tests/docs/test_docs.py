"""What the documentation shows is true: examples run, commands exist, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from sweeps import swept

import se_retrofit
from se_retrofit.cli.commands import app

pytestmark = pytest.mark.usefixtures("timm_registry_as_before")

ROOT = Path(__file__).parents[2]
LONG_PAGES = ("finetuning", "folding", "inspecting", "trainers")
LONG_EXAMPLES = tuple(f"se_retrofit.{part}." for part in ("exporting", "finetune", "folding", "fusion"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<comment><!--[^>]*-->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# written on the line above a fence: the code in it can't run in a test, and why
NOT_RUN = "<!-- not run:"
# written on the line above a fence: it holds what the Python above it prints
OUTPUT = "<!-- output -->"


def parted(items: list[Any], long: Callable[[Any], bool]) -> tuple[list[Any], list[Any]]:
    """Those that the default run takes, and those that are left to the sweeps."""
    return [item for item in items if not long(item)], [item for item in items if long(item)]


def fences(page: Path, *languages: str) -> list[re.Match[str]]:
    """A page's fenced blocks in one of the languages, without those that are marked as not run."""
    found = FENCE.finditer(page.read_text())
    return [f for f in found if f["language"] in languages and not (f["comment"] or "").startswith(NOT_RUN)]


def modules() -> list[ModuleType]:
    walked = pkgutil.walk_packages(se_retrofit.__path__, "se_retrofit.")
    names = ["se_retrofit", *(module.name for module in walked if not module.name.endswith("__main__"))]
    return [importlib.import_module(name) for name in names]


def documented() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for module in modules() for test in finder.find(module, globs={}) if test.examples]
    return sorted(tests, key=lambda test: test.name)


@pytest.mark.parametrize(
    "test",
    swept(*parted(documented(), lambda test: test.name.startswith(LONG_EXAMPLES))),
    ids=lambda test: test.name.removeprefix("se_retrofit."),
)
def test_examples_in_docstrings_run(
    test: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(se_retrofit.__all__))
def test_what_the_package_exports_is_documented_with_an_example(name: str) -> None:
    thing = getattr(se_retrofit, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        assert ">>>" in (inspect.getdoc(thing) or ""), f"{name} has no example"


@pytest.mark.parametrize(
    "page", swept(*parted(PAGES, lambda page: page.stem in LONG_PAGES)), ids=lambda page: page.name
)
def test_python_in_the_pages_runs_and_prints_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}  # one for the page: later blocks go on from earlier ones
    for fence in fences(page, "python", "text"):
        if fence["language"] == "python":
            capsys.readouterr()
            # offline, a network has random weights
            code = fence["code"].replace("pretrained=True", "pretrained=False")
            exec(compile(code, str(page), "exec"), namespace)
        elif (fence["comment"] or "").startswith(OUTPUT):
            assert capsys.readouterr().out.strip() == fence["code"].strip()


def commands_in(page: Path) -> list[str]:
    code = "\n".join(fence["code"] for fence in fences(page, "sh", "bash", "console"))
    lines = code.replace("\\\n", " ").splitlines()
    calls = (line.removeprefix("$ ").partition("  #")[0].strip() for line in lines)
    parts = (part.strip() for line in calls for part in line.split("&&"))
    return [p for p in parts if re.match(r"(python3? -m se_retrofit|se-retrofit)\b", p)]


@pytest.mark.parametrize("call", sorted({call for page in PAGES for call in commands_in(page)}))
def test_commands_in_the_pages_exist_with_their_options(call: str) -> None:
    words = shlex.split(re.sub(r"^python3? -m se_retrofit|^se-retrofit", "", call))
    words = [word for word in words[: words.index("|") if "|" in words else None] if word not in ("-h", "--help")]
    group = typer.main.get_command(app)
    with group.make_context("se-retrofit", words[:1], resilient_parsing=True) as context:
        if words and not words[0].startswith("-"):
            command = group.get_command(context, words[0])  # type: ignore[attr-defined]
            assert command is not None, f"no command {words[0]}"
            # raises a usage error where an option or an argument is wrong; does not run the command
            command.make_context(words[0], words[1:], resilient_parsing="--help" in call)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text()))  # a[0](x) is no link
    local = [target for target in targets if not re.match(r"https?://|mailto:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.fixture
def run_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a program as ``python PROGRAM`` does, in an empty folder; gives what it printed."""

    def run(script: Path, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(script.parent))
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.sweep
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("[ri]*t_*.py")), ids=lambda script: script.name)
def test_examples_run(script: Path, run_script: Callable[..., str]) -> None:
    output = run_script(script)
    assert output
    assert not re.search(r"(?<!=)\bFalse\b", output)  # the examples print whether things are equal


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "arguments", "says", "times"),
    [
        ("surgery", "--networks torchvision/resnet18 --depths 1", "| torchvision/resnet18 | 8 |", 1),
        ("inference", "--device cpu --batch 2 --size 64 --plain resnet18 --native seresnet18", "retrofitted |", 2),
    ],
)
def test_benchmarks_run(name: str, arguments: str, says: str, times: int, run_script: Callable[..., str]) -> None:
    output = run_script(ROOT / "benchmarks" / f"{name}.py", "--rounds", "1", *arguments.split())
    assert output.count(says) == times


# what each needs, and what it must say
TRAINERS = {
    "trainer_detection.py": (None, ["8 SE modules", "the loss has fallen: True", "same boxes: True"]),
    "trainer_lightning.py": ("lightning", ["same outputs: True", "right: 100%"]),
    "trainer_monai.py": ("monai", ["4 SE modules", "the loss has fallen: True", "same mask: True"]),
    "trainer_segmentation.py": (None, ["16 SE modules", "the loss has fallen: True", "same scores: True"]),
    "trainer_transformers.py": ("transformers", ["same outputs: True", "right: 100%"]),
    "trainer_ultralytics.py": ("ultralytics", ["DetectionModel with 10 SE modules", "the base's weights: True"]),
}


def test_every_trainer_example_has_a_test() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("trainer_*.py")) == sorted(TRAINERS)


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_a_retrofitted_network_trains_and_is_saved_by(name: str, tmp_path: Path) -> None:
    package, said = TRAINERS[name]
    if package is not None:
        pytest.importorskip(package)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / "examples" / name]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for line in said:
        assert line in done.stdout
