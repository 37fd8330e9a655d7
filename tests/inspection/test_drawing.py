"""Drawings of blocks show SE between its neighbours, and before and after have their nodes in line."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspected import boxes, inspected

from se_retrofit import RetrofitError
from se_retrofit.inspection.drawing import sides_of
from se_retrofit.inspection.layout import GAP, LANE, Edge, layered
from se_retrofit.inspection.svg import file_of

SVG = "{http://www.w3.org/2000/svg}"


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[float], list[Edge]]:
    """Widths of some nodes, and edges from earlier to later ones."""
    number = draw(st.integers(1, 9))
    widths = draw(st.lists(st.floats(20, 200), min_size=number, max_size=number))
    return widths, sorted(draw(st.sets(st.sampled_from(list(combinations(range(number), 2)) or [(0, 0)]))) - {(0, 0)})


@given(graphs())
def test_in_a_layout_edges_lead_down_and_nothing_overlaps(graph: tuple[list[float], list[Edge]]) -> None:
    widths, edges = graph
    layout = layered(widths, edges)
    rows: dict[int, dict[float, float]] = {}
    for x, row, width in zip(layout.x, layout.row, widths, strict=True):
        assert x not in rows.setdefault(row, {})
        rows[row][x] = width
    for source, end in edges:
        assert layout.row[source] < layout.row[end]
        lanes = layout.lanes[source, end]
        assert len(lanes) == layout.row[end] - layout.row[source] - 1
        for row, lane in enumerate(lanes, start=layout.row[source] + 1):
            assert rows.setdefault(row, {}).setdefault(lane, LANE) == LANE
    for row in rows.values():
        places = sorted(row.items())
        for (x, width), (other, wide) in pairwise(places):
            assert other - x >= (width + wide) / 2 + GAP - 1e-6
        assert places[0][0] - places[0][1] / 2 >= -1e-6
        assert places[-1][0] + places[-1][1] / 2 <= layout.width + 1e-6


def test_the_branch_of_a_residual_block_is_one_line_and_edges_that_can_do_not_cross() -> None:
    branch = layered([100.0] * 5, [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)])
    assert len(set(branch.x)) == 1
    assert len(set(branch.lanes[0, 3])) == 1
    crossed = layered([100.0] * 4, [(0, 3), (1, 2)])
    assert (crossed.x[0] < crossed.x[1]) == (crossed.x[3] < crossed.x[2])


def drawn(name: str, block: str) -> list[ET.Element]:
    return [ET.fromstring(side.svg("")) for side in sides_of(inspected(name).block(block))]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("tv/resnet50", "layer1.0"),
        ("tv/googlenet", "inception3a"),
        ("tv/densenet121", "features.denseblock1.denselayer4"),
    ],
    ids=["residual", "branches", "dense"],
)
def test_before_and_after_differ_in_nothing_but_se(name: str, block: str) -> None:
    before, after = drawn(name, block)
    assert (before.get("width"), before.get("height")) == (after.get("width"), after.get("height"))
    own = list(boxes(after))
    assert [box.role for box in own].count("se") == 1
    assert list(boxes(before)) == [box for box in own if box.role != "se"]
    lines = [[p.get("class") for p in side.iter("path") if p.get("class") == "se"] for side in (before, after)]
    assert (lines[0], len(lines[1])) == ([], 2)
    labels = [[t.text for t in side if t.tag == "text"] for side in (before, after)]
    assert len(labels[1]) == len(labels[0]) + 1


def test_a_bottleneck_is_drawn_with_its_layers_shapes_and_skip() -> None:
    _, after = drawn("tv/resnet50", "layer1.1")
    rows = sorted(boxes(after), key=lambda box: box.y)
    assert [(box.role, *box.text) for box in rows[5:11]] == [
        ("norm", "bn2", "BatchNorm2d"),
        ("act", "relu", "ReLU"),
        ("conv", "conv3", "Conv2d 64 \u2192 256, 1x1"),
        ("norm", "bn3", "BatchNorm2d"),
        ("se", "SE 256 \u2192 16 \u2192 256", "se_attention"),
        ("join", "+"),
    ]
    assert len({box.x for box in rows if box.role != "join"}) == 1  # the branch is one line
    assert {t.text for t in after if t.tag == "text"} == {"64\u00d756\u00d756", "256\u00d756\u00d756"}


def test_several_tensors_lists_of_inputs_and_parameters_are_no_boxes_of_their_own() -> None:
    def names(name: str, block: str) -> list[str]:
        return [box.text[0] for box in boxes(drawn(name, block)[1])]

    split = names("tv/shufflenet_v2_x1_0", "stage2.1")
    assert {"split", "cat"} < set(split)
    assert "getitem" not in split
    scaled = names("tv/convnext_tiny", "features.1.0")
    assert "\u00d7 layer_scale" in scaled
    assert "layer_scale" not in scaled
    assert [n for n in names("tv/densenet121", "features.denseblock1.denselayer4") if "input" in n] == ["input x"]


def test_a_file_has_the_network_and_each_distinct_block_in_colours_that_all_programs_know(tmp_path: Path) -> None:
    text = inspected("tv/resnet50").draw(tmp_path / "a.svg").read_text()
    root = ET.fromstring(text)
    frames = [frame for frame in root if frame.tag == f"{SVG}svg"]
    assert len(frames) == 3
    words = [[t.text for t in frame.iter(f"{SVG}text")] for frame in frames]
    assert "layer3.5" in words[0]
    assert words[1][:2] == ["layer1.0: Bottleneck, residual", "like it: layer2.0, layer3.0, layer4.0"]
    assert words[1].count("before") == words[1].count("after") == 1
    assert re.search(r"var\(|--\w", text) is None
    corners = [[float(f.get(key, "")) for key in ("x", "y", "width", "height")] for f in frames]
    for x, y, width, height in corners:
        assert x + width <= float(root.get("width", "")) + 1
        assert y + height <= float(root.get("height", "")) + 1
    one = inspected("small").draw(tmp_path / "b.svg", "layer2.0").read_text()
    assert one.count("<svg") == 4  # the file, the block, before and after
    assert file_of(sides_of(inspected("small").block("layer2.0"))[0], "a & b").count("a &amp; b") == 1


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    inspection = inspected("small")
    for name in ("a.png", "nowhere/a.svg"):
        with pytest.raises(RetrofitError, match=name.split("/")[0]):
            inspection.draw(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
