"""docs/zoo.md says on which commit all names were last walked, and a sweep says what has changed since."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.zoo import Entry, FullRun, Row, changed_since, command, entries, present_run, read_rows, read_run

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "protocol.file.allow=always")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(folder: Path, text: str, message: str) -> str:
    """A commit of a file of the surgery and of one that is none."""
    for file in (folder / "README.md", folder / "se_retrofit" / "surgery" / "blocks.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", message)
    return git(folder, "rev-parse", "--short", "HEAD")


def test_files_of_the_surgery_that_changed_since_a_commit_are_told_where_git_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shallow = tmp_path / "repository", tmp_path / "shallow"
    folder.mkdir()
    git(folder, "init", "--quiet")
    first = write(folder, "old\n", "first")
    assert changed_since(first, folder) == []
    write(folder, "new\n", "second")
    assert changed_since(first, folder) == ["se_retrofit/surgery/blocks.py"]
    (folder / "se_retrofit" / "surgery" / "blocks.py").write_text("newer\n")
    assert changed_since("HEAD", folder) == ["se_retrofit/surgery/blocks.py"]  # what is not committed, too
    git(tmp_path, "clone", "--quiet", "--depth", "1", folder.as_uri(), "shallow")
    assert changed_since(first, shallow) is None
    shutil.rmtree(folder / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert changed_since(first, folder) is None
    monkeypatch.setenv("PATH", "")
    assert changed_since("HEAD", shallow) is None


def test_a_walk_over_some_names_or_one_that_was_resumed_is_no_full_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [Entry("timm", "one", "a"), Entry("timm", "one", "b")]
    monkeypatch.setattr(command, "entries", lambda patterns: names[:1] if patterns else names)
    monkeypatch.setattr(command, "walk", lambda todo, *_: [Row(e.name, e.family, "converted", 1) for e in todo])
    page = tmp_path / "zoo.md"

    def walked(*arguments: str) -> FullRun | None:
        assert CliRunner().invoke(command.app, [*arguments, "--output", str(tmp_path / "zoo")]).exit_code == 0
        return read_run(page.read_text())

    assert walked("a") is None
    assert walked() is None  # it went on with the row of a
    assert walked("--fresh") == present_run()
    page.write_text(page.read_text().replace(present_run().commit, "0123abc"))
    (tmp_path / "zoo.csv").write_text("".join((tmp_path / "zoo.csv").read_text().splitlines(keepends=True)[:2]))
    assert walked() == FullRun("0123abc", present_run().versions)


@pytest.mark.sweep
@pytest.mark.filterwarnings("always:the last walk over all names")
def test_the_page_names_the_last_walk_over_all_names_and_the_summary_says_what_changed_since() -> None:
    run, present = read_run(PAGE.read_text()), present_run()
    assert run is not None, "docs/zoo.md must name the last full run: python -m tools.zoo --output docs/zoo --fresh"
    changed = changed_since(run.commit)
    missing = {entry.name for entry in entries()} - {row.name for row in read_rows(PAGE.with_suffix(".csv"))}
    news = [
        f"whether the surgery has changed since commit {run.commit} can't be told: git does not have it here"
        if changed is None
        else f"{len(changed)} files of the surgery have changed since commit {run.commit}: {', '.join(changed)}",
        f"it was with {run.versions}, and here are {present.versions}",
        f"{len(missing)} names are new: {', '.join(sorted(missing)[:10])}",
    ]
    told = [
        text for text, so in zip(news, (changed != [], run.versions != present.versions, missing), strict=True) if so
    ]
    if told:  # nothing is wrong with that: the sweep walks one network of each structure
        warnings.warn(f"the last walk over all names is not of what is here: {'; '.join(told)}", stacklevel=1)
