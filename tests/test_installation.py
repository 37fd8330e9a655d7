"""A light installation: what needs an extra says which, and all else works without."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXTRAS = ("accelerate", "jinja2", "matplotlib", "rich", "scipy", "sklearn", "typer")


def run_without(packages: tuple[str, ...], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter in which these packages can't be imported, as if they were not installed."""
    blocked = f"""
        import sys

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in {packages!r} else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = map(Without, sys.meta_path)
    """
    program = textwrap.dedent(blocked) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.mark.sweep
def test_the_surgery_saving_and_reports_as_text_need_no_extra(tmp_path: Path) -> None:
    code = """
        import timm
        from se_retrofit import add_se, inspect_se, load_retrofitted, remove_se, save_retrofitted

        model = add_se(timm.create_model("resnet18"))
        save_retrofitted(model, "saved", base="timm/resnet18")
        loaded = load_retrofitted("saved")
        print(inspect_se(loaded).report())
        print(inspect_se(loaded).graph("layer1.0"))
        remove_se(loaded)
    """
    done = run_without(EXTRAS, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8, reduction 8, gate identity" in done.stdout
    assert "> SE 64 -> 8 -> 64 after bn2 (BatchNorm2d), before +=" in done.stdout


NETWORK = """
import torchvision
from se_retrofit import add_se, inspect_se
model = add_se(torchvision.models.resnet18())
"""
WRITE_HTML = NETWORK + "inspect_se(model).write_html('a.html')"


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("package", "name", "code"),
    [
        ("accelerate", "finetune", "from se_retrofit.finetune import finetune"),
        ("jinja2", "inspect", WRITE_HTML),
    ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(package: str, name: str, code: str, tmp_path: Path) -> None:
    done = run_without((package,), code, tmp_path)
    assert done.returncode != 0
    expected = (
        f"RetrofitError: the package {package} is not installed; install what this needs with "
        f"pip install 'se-retrofit[{name}]'"
    )
    assert done.stderr.rstrip().endswith(expected)


def test_the_command_line_without_its_extra_says_so_in_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['se-retrofit', 'demo']; from se_retrofit.cli import main; main()"
    done = run_without(("typer",), code, tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the package typer is not installed; install what this needs with pip install 'se-retrofit[cli]'\n"
    )


def test_the_version_is_told_without_importing_torch(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['se-retrofit', '--version']; from se_retrofit.cli import main; main()"
    done = run_without(("torch",), code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("se-retrofit ")
