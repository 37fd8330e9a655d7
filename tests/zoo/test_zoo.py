"""The zoo: names, rows, the walk over them, tables and the command; and where SE goes in a few dozen networks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from residual_units import residual_units
from sweeps import swept
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo_rows import listed_rows

from se_retrofit import RetrofitError, SEAttention, add_se, has_se
from se_retrofit.surgery.record.runs import record
from tools.zoo import (
    Entry,
    FullRun,
    Row,
    changed_since,
    check,
    command,
    entries,
    present_run,
    read_rows,
    read_run,
    walk,
    write_markdown,
)
from tools.zoo.check import CheckFailed, inspect_model
from tools.zoo.command import app
from tools.zoo.tables import BEGIN, END, RowWriter, family_table, summary_line

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn a great deal while they build networks

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
ROWS = [
    Row("timm/a", "one", "converted", 1000, 128, {"residual": 2}, ["Block"], {"it is odd": 1}, 1.5),
    Row("timm/b", "one", "refused: no convolutional blocks", 2000, seconds=0.5),
    Row("torchvision/c", "two", "failed: RuntimeError: a | b", 3000),
]


# Names ------------------------------------------------------------------------------------------------------------------


def test_the_zoo_holds_every_name_of_both_libraries_and_patterns_choose_among_them() -> None:
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names)) == len(timm.list_models()) + len(torchvision.models.list_models())
    assert {"timm/resnet50", "torchvision/raft_small", "torchvision/quantized_resnet18"} <= set(names)
    assert [e.name for e in entries(["resnet18"])] == ["timm/resnet18", "torchvision/resnet18"]
    assert {e.library for e in entries(["torchvision/*18"])} == {"torchvision"}
    with pytest.raises(RetrofitError, match=rf"'resnet19' .*{len(names)}"):
        entries(["resnet19"])


def test_a_network_is_built_without_memory_where_its_constructor_lets_it() -> None:
    by_name = {e.name: e for e in entries(["torchvision/resnet18", "torchvision/regnet_y_400mf"])}
    assert next(by_name["torchvision/resnet18"].build().parameters()).is_meta
    assert not next(by_name["torchvision/regnet_y_400mf"].build().parameters()).is_meta  # reads numbers off tensors


# One network ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision/quantized_mobilenet_v2", "torchvision/squeezenet1_1", "timm/test_vit"])
def test_a_row_is_that_of_the_last_walk(name: str) -> None:
    """tests/sweeps/test_walk.py has one network of each structure."""
    (entry,) = entries([name])
    row = check(entry)
    (listed,) = [row for row in listed_rows() if row.name == name]
    for name in ("verdict", "kinds", "extra", "classes"):
        assert getattr(row, name) == getattr(listed, name)


UNITS = [
    "timm/test_resnet", "timm/test_convnext", "timm/resnetv2_18", "timm/convnext_atto", "timm/mobilenetv2_035",
    "timm/efficientnet_es", "timm/dla34", "timm/res2net50_48w_2s", "timm/hrnet_w18_small", "timm/ghostnet_050", "timm/fasternet_t0",
    "timm/inception_next_atto", "timm/legacy_xception", "timm/cs3darknet_focus_s", "timm/tresnet_m", "timm/fastvit_t8",
    "timm/xcit_nano_12_p16_224", "torchvision/resnet18", "torchvision/mobilenet_v3_large", "torchvision/r3d_18",
    "torchvision/fcn_resnet50", "torchvision/quantized_resnet18", "torchvision/regnet_x_400mf",
]  # fmt: skip


@pytest.mark.parametrize("name", swept(UNITS[:2], UNITS[2:]))
def test_every_residual_unit_has_one_se_or_channel_attention_of_its_own(name: str) -> None:
    (entry,) = entries([name])
    model = add_se(entry.build(), inplace=True)
    (x,) = record(model).inputs.args
    if not next(model.parameters()).is_meta:
        x = torch.zeros(1, *x.shape[1:])
    units = residual_units(model, (x,))
    assert units
    assert [len(unit.ses) for unit in units] == [0 if unit.gated else 1 for unit in units]
    in_units = {se for unit in units for se in unit.ses}
    for path, module in model.named_modules():
        if isinstance(module, SEAttention) and module.site.kind == "residual":
            assert module in in_units, f"{path} is in no residual unit"


class Forgetful(nn.Sequential):
    """Loses a key of its state dict after the retrofit, as a bug in the surgery would."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        return {key: state[key] for key in state if key != "0.weight" or not has_se(self)}


def test_a_broken_promise_fails_the_row() -> None:
    model = Forgetful(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(CheckFailed, match="original keys"):
        inspect_model(model, Row("mine/forgetful", "mine", "failed: "))


def test_what_cannot_be_built_is_a_failed_row() -> None:
    row = check(Entry("torchvision", "none", "no_such_model"))
    assert re.match("failed: .*no_such_model", row.verdict.lower())


# The walk ---------------------------------------------------------------------------------------------------------------


def crash_or_hang(entry: Entry) -> Row:
    """Stands in for ``check``: some models take their process with them."""
    if entry.model == "crashes":
        os._exit(7)
    if entry.model == "hangs":
        time.sleep(600)
    return Row(entry.name, entry.family, "converted")


@pytest.mark.sweep
def test_a_crash_or_a_hang_is_that_models_row_and_the_walk_goes_on() -> None:
    todo = [Entry("mine", "mine", model) for model in ("good", "crashes", "fine", "hangs", "well")]
    verdicts = {row.name: row.verdict for row in walk(todo, jobs=2, timeout=2.0, startup=60.0, checker=crash_or_hang)}
    assert verdicts == {
        "mine/good": "converted",
        "mine/crashes": "failed: its process died with exit code 7",
        "mine/fine": "converted",
        "mine/hangs": "failed: timed out after 2 s",
        "mine/well": "converted",
    }


# Tables -----------------------------------------------------------------------------------------------------------------


def written(path: Path, rows: list[Row]) -> None:
    for row in rows:  # opened anew for each, as by walks that were cut off
        writer = RowWriter(path)
        writer.write(row)
        writer.close()


def test_rows_survive_the_csv_file_and_one_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "zoo.csv"
    assert read_rows(path) == []
    written(path, ROWS)
    assert read_rows(path) == ROWS
    text = path.read_text()
    path.write_text(text[: text.rindex("3000")])
    assert read_rows(path) == ROWS[:2]
    written(path, ROWS[2:])
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("do", "fact"),
    [
        (lambda file: read_rows(file), r"was not written by python -m tools\.zoo"),
        (lambda file: write_markdown(ROWS, file), "to write between"),
        (lambda file: app(["torchvision/alexnet", "--output", str(file / "zoo")]), "there is no folder"),
    ],
    ids=["csv of something else", "page without the marks", "no folder"],
)
def test_a_file_that_is_not_of_the_zoo_is_left_alone(do: Callable[[Path], object], fact: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RetrofitError, match=fact):
        do(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_tables_replace_the_old_ones_and_leave_the_text_around_them(tmp_path: Path) -> None:
    path = tmp_path / "zoo.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nAfterwards.\n")
    for _ in range(2):
        write_markdown(ROWS, path)
    text = path.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n3 names: 1 converted, 1 refused: no convolutional blocks")
    assert text.endswith(f"{END}\n\nAfterwards.\n")
    assert "old" not in text
    assert r"| torchvision/c | RuntimeError: a \| b |" in text
    assert "| timm/a | converted | 2 residual | 128 (+12.8%) | 1,000 | 1.5 |" in text
    assert "| it is odd | 1 | 1 | timm/a |" in text


def test_families_are_summed_up() -> None:
    head, one, two = family_table(ROWS)
    assert dict(zip(head, one, strict=True)) == {
        "family": "timm one", "names": "2", "converted": "1", "no conv blocks": "1", "has attention": "", "failed": "",
        "SE modules": "2", "kinds": "residual", "blocks": "Block",
    }  # fmt: skip
    assert two[:2] == ("torchvision two", "1")
    assert summary_line(ROWS).startswith("3 names: 1 converted, ")


# The command ------------------------------------------------------------------------------------------------------------


@pytest.mark.sweep
def test_the_command_writes_both_files_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    names = ["torchvision/alexnet", "torchvision/squeezenet1_1", "test_vit"]
    arguments = [*names, "--jobs", "1", "--output", str(tmp_path / "zoo")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "3 names: 2 converted, 1 refused: no convolutional blocks" in first.output
    rows = read_rows(tmp_path / "zoo.csv")
    assert {row.name: row.kinds for row in rows} == {
        "torchvision/alexnet": {"chain": 5}, "torchvision/squeezenet1_1": {"multi-branch": 8}, "timm/test_vit": {},
    }  # fmt: skip
    lines = (tmp_path / "zoo.csv").read_text().splitlines(keepends=True)
    (tmp_path / "zoo.csv").write_text("".join(lines[:2]))  # a walk that was cut off after its first row
    assert CliRunner().invoke(app, arguments).exit_code == 0
    again = read_rows(tmp_path / "zoo.csv")
    assert [row.name for row in again] == [row.name for row in rows]
    assert again[0] == rows[0]  # its seconds, too: it was not done again
    assert "| torchvision/alexnet | converted | 5 chain |" in (tmp_path / "zoo.md").read_text()


# The last walk over all names ---------------------------------------------------------------------------------------------


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
        assert CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "zoo")]).exit_code == 0
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
    told = []
    if changed is None:
        told.append(
            f"whether the surgery has changed since commit {run.commit} can't be told: git does not have it here"
        )
    elif changed:
        told.append(f"{len(changed)} files of the surgery have changed since commit {run.commit}: {', '.join(changed)}")
    if run.versions != present.versions:
        told.append(f"it was with {run.versions}, and here are {present.versions}")
    if missing:
        told.append(f"{len(missing)} names are new: {', '.join(sorted(missing)[:10])}")
    if told:  # nothing is wrong with that: the sweep walks one network of each structure
        warnings.warn(f"the last walk over all names is not of what is here: {'; '.join(told)}", stacklevel=1)
