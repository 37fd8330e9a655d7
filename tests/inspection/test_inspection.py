"""One object has every view of a retrofitted network, which is recorded once for all of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from inspected import retrofitted, small_resnet
from rich.console import Console

from se_retrofit import RetrofitError, add_se, inspect_se
from se_retrofit.inspection import graphs


def test_all_views_come_from_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bool] = []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args, **kw: recorded.append(True) or record(*args, **kw))
    inspection = inspect_se(add_se(small_resnet()))
    assert str(inspection) == str(inspection.report())
    views = [inspection.graph(), inspection.graph("layer1.0"), inspection.diff(), inspection.diff("layer1.0")]
    assert all(str(view) for view in views)
    assert inspection.draw(tmp_path / "a.svg").exists()
    assert inspection.write_html(tmp_path / "a.html").exists()
    assert inspection.to_dict()["rows"]
    assert len(recorded) == 2  # with SE and without


def test_the_diff_shows_each_distinct_block_once_and_names_the_others() -> None:
    text = str(inspect_se(retrofitted("tv/resnet50")).diff())
    assert text.count("+++ ") == 2
    assert "+++ layer1.0, Bottleneck.forward with SE" in text
    assert "like it: layer2.0, layer3.0, layer4.0" in text


def test_rich_prints_the_report_in_colour() -> None:
    inspection, terminal = inspect_se(add_se(small_resnet())), io.StringIO()
    Console(file=terminal, force_terminal=True, width=200).print(inspection)
    assert "\x1b[" in terminal.getvalue()
    assert "layer1.0" in terminal.getvalue()
    assert repr(inspection) == "<Inspection of ResNet: 5 SE modules in 5 blocks>"


def test_every_view_of_a_block_refuses_one_that_is_not_there(tmp_path: Path) -> None:
    inspection = inspect_se(add_se(small_resnet()))
    for view in (inspection.block, inspection.graph, inspection.diff, lambda b: inspection.draw(tmp_path / "a.svg", b)):
        with pytest.raises(RetrofitError, match="no retrofitted block 'layer7'"):
            view("layer7")
    assert list(tmp_path.iterdir()) == []
