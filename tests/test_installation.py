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


HTML = """
    import torchvision
    from se_retrofit import add_se, inspect_se
    inspect_se(add_se(torchvision.models.resnet18())).write_html("a.html")
"""
FINETUNE = "from se_retrofit.finetune import finetune"
COMMAND = "import sys; sys.argv = ['se-retrofit', {!r}]; from se_retrofit.cli import main; main()"


@pytest.mark.parametrize(
    ("package", "extra", "kind", "code"),
    [
        ("typer", "cli", "error", COMMAND.format("demo")),
        pytest.param("accelerate", "finetune", "RetrofitError", FINETUNE, marks=pytest.mark.sweep),
        pytest.param("jinja2", "inspect", "RetrofitError", HTML, marks=pytest.mark.sweep),
    ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(
    package: str, extra: str, kind: str, code: str, tmp_path: Path
) -> None:
    done = run_without((package,), code, tmp_path)
    assert done.returncode == 1
    told = f"the package {package} is not installed; install what this needs with pip install 'se-retrofit[{extra}]'"
    assert done.stderr.splitlines()[-1].removeprefix("se_retrofit.errors.") == f"{kind}: {told}"
    assert kind == "RetrofitError" or done.stderr.count("\n") == 1


def test_the_version_is_told_without_importing_torch(tmp_path: Path) -> None:
    done = run_without(("torch",), COMMAND.format("--version"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("se-retrofit ")
