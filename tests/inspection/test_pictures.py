"""Pictures of blocks show SE between its neighbours; that of the network its blocks and the connections that skip something."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inspected import Box, Siamese, UNet, boxes, example, inspected
from torch import nn
from torchvision.models.resnet import BasicBlock

from se_retrofit import RetrofitError, add_se, inspect_se
from se_retrofit.inspection.drawing import sides_of
from se_retrofit.inspection.layout import GAP, LANE, Edge, layered
from se_retrofit.inspection.network import Network, Node, network_of
from se_retrofit.inspection.picture import picture
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


# Blocks ---------------------------------------------------------------------------------------------------------------


def sides(name: str, block: str) -> list[ET.Element]:
    return [ET.fromstring(side.svg("")) for side in sides_of(inspected(name).block(block))]


@pytest.mark.parametrize(
    ("name", "block"),
    [("bottleneck", "layer1.0"), ("branches", "1"), ("dense", "features.denseblock1.denselayer4")],
)
def test_before_and_after_differ_in_nothing_but_se(name: str, block: str) -> None:
    before, after = sides(name, block)
    assert (before.get("width"), before.get("height")) == (after.get("width"), after.get("height"))
    own = list(boxes(after))
    assert [box.role for box in own].count("se") == 1
    assert list(boxes(before)) == [box for box in own if box.role != "se"]
    lines = [[p.get("class") for p in side.iter("path") if p.get("class") == "se"] for side in (before, after)]
    assert (lines[0], len(lines[1])) == ([], 2)
    labels = [[t.text for t in side if t.tag == "text"] for side in (before, after)]
    assert len(labels[1]) == len(labels[0]) + 1
    # no arrow is broken: each line ends at a tip, or where another goes on
    drawn = {
        kind: [p.get("d", "") for p in before.iter("path") if p.get("class") == kind] for kind in ("flow", "flow tip")
    }
    begun = {path.split()[0] for paths in drawn.values() for path in paths}
    for path in drawn["flow"]:
        *_, curve, bottom = path.split()
        assert f"M{curve.split(',')[0]},{bottom[1:]}" in begun


def test_a_bottleneck_is_drawn_with_its_layers_shapes_and_skip() -> None:
    _, after = sides("bottleneck", "layer1.1")
    rows = sorted(boxes(after), key=lambda box: box.y)
    assert [(box.role, *box.text) for box in rows[5:11]] == [
        ("norm", "bn2", "BatchNorm2d"),
        ("act", "relu", "ReLU"),
        ("conv", "conv3", "Conv2d 16 \u2192 256, 1x1"),
        ("norm", "bn3", "BatchNorm2d"),
        ("se", "SE 256 \u2192 16 \u2192 256", "se_attention"),
        ("join", "+"),
    ]
    assert len({box.x for box in rows if box.role != "join"}) == 1  # the branch is one line
    assert {t.text for t in after if t.tag == "text"} == {"16\u00d716\u00d716", "256\u00d716\u00d716"}


def test_several_tensors_lists_of_inputs_and_parameters_are_no_boxes_of_their_own() -> None:
    def names(name: str, block: str) -> set[str]:
        return {box.text[0] for box in boxes(sides(name, block)[1])}

    assert {"split", "cat"} < names("split", "stage2.1")
    assert "getitem" not in names("split", "stage2.1")
    assert "\u00d7 layer_scale" in names("scaled", "features.1.0")
    assert "layer_scale" not in names("scaled", "features.1.0")
    assert {n for n in names("dense", "features.denseblock1.denselayer4") if "input" in n} == {"input x"}


def test_a_file_has_the_network_and_each_distinct_block_in_colours_that_all_programs_know(tmp_path: Path) -> None:
    inspection = inspected("residual")
    text = inspection.draw(tmp_path / "a.svg").read_text()
    root = ET.fromstring(text)
    frames = [frame for frame in root if frame.tag == f"{SVG}svg"]
    words = [[t.text for t in frame.iter(f"{SVG}text")] for frame in frames]
    assert [found[0] for found in words[1:]] == ["layer1.0: BasicBlock, residual", "layer2.0: BasicBlock, residual"]
    assert "layer2.1" in words[0]
    assert words[1][1] == "like it: layer2.1"
    assert words[1].count("before") == words[1].count("after") == 1
    assert re.search(r"var\(|--\w", text) is None
    for frame in frames:
        x, y, width, height = (float(frame.get(key, "")) for key in ("x", "y", "width", "height"))
        assert x + width <= float(root.get("width", "")) + 1
        assert y + height <= float(root.get("height", "")) + 1
    one = inspection.draw(tmp_path / "b.svg", "layer2.0").read_text()
    assert one.count("<svg") == 4  # the file, the block, before and after
    assert file_of(sides_of(inspection.block("layer2.0"))[0], "a & b").count("a &amp; b") == 1
    for name in ("a.png", "nowhere/a.svg"):
        with pytest.raises(RetrofitError, match=name.split("/")[0]):
            inspection.draw(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


# The network ----------------------------------------------------------------------------------------------------------


def skips(network: Network) -> list[tuple[str, str]]:
    return [(edge.source.name, edge.end.name) for edge in network.edges if edge.skips]


def test_a_residual_network_is_a_chain_of_blocks_that_have_bypasses() -> None:
    network = network_of(inspected("bottleneck"))
    assert [(n.name, n.kind, n.ses, n.bypass) for n in network.nodes] == [
        ("input", "function", 0, False),
        ("conv1", "module", 0, False),
        *((f"layer{block}", "block", 1, True) for block in ("1.0", "1.1", "2.0", "3.0", "4.0")),
        ("avgpool", "module", 0, False),
    ]
    assert (network.nodes[1].last, network.nodes[-1].last) == ("maxpool", "fc")
    assert [(e.source, e.end) for e in network.edges] == list(pairwise(network.nodes))
    assert skips(network) == []


def test_the_skips_of_a_u_net_lead_past_what_is_below() -> None:
    network = network_of(inspected("unet"))
    joins = [n for n in network.nodes if n.kind == "join"]
    assert [n.name for n in joins] == ["cat", "cat"]
    found = [(e.source.name.partition(".")[0], joins.index(e.end)) for e in network.edges if e.skips]
    assert found == [("d2", 0), ("d1", 1)]
    assert sum(n.ses for n in network.nodes) == 10


def test_a_decoder_without_se_is_opened_so_that_the_u_is_seen() -> None:
    model = add_se(UNet(), example_inputs=example(), exclude="decoder.*")
    network = network_of(inspect_se(model, example()))
    assert sum(n.ses for n in network.nodes) == 6
    assert skips(network) == [("d2.net", "cat"), ("d1.net", "cat")]
    stages = [n.space[0] for n in network.nodes if n.kind in ("block", "join")]
    assert stages == [64, 32, 16, 32, 64]


def test_every_layer_of_a_dense_block_takes_all_before_it() -> None:
    network = network_of(inspected("dense"))
    layers = [n for n in network.nodes if n.name.startswith("features.denseblock1.")]
    assert [sum(e.end is n for e in network.edges) for n in layers] == [1, 2, 3, 4]
    assert [sum(e.skips for e in network.edges if e.end is n) for n in layers] == [0, 1, 2, 3]
    assert not any(n.bypass for n in layers)  # what a layer gives is new; the concatenation is outside of it


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("traced", ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]),
        ("functions", ["conv1", "conv2"]),
        ("twice", ["block", "block"]),
    ],
)
def test_blocks_that_are_parts_of_a_graph_and_blocks_called_twice_are_in_it(name: str, blocks: list[str]) -> None:
    network = network_of(inspected(name))
    assert [n.name for n in network.nodes if n.kind == "block"] == blocks
    assert skips(network) == []


def test_where_the_network_itself_is_the_block_its_se_is_marked() -> None:
    inspection = inspect_se(add_se(BasicBlock(8, 8), example_inputs=torch.empty(2, 8, 8, 8)))
    network = network_of(inspection)
    assert [(n.name, n.kind, n.ses) for n in network.nodes if n.ses] == [("se_attention", "block", 1)]
    assert [n.block.path for n in network.nodes if n.block is not None] == [""]
    assert skips(network) == [("input", "+")]
    assert inspection.report().model == "BasicBlock"
    assert str(inspection.graph()).count("SE 8 -> 4 -> 8") == 1


def drawn(network: Network) -> ET.Element:
    links = {n.name: f"#block-{i}" for i, n in enumerate(network.nodes) if n.kind == "block"}
    return ET.fromstring(picture(network, links).svg("the network"))


def named(svg: ET.Element) -> dict[str, Box]:
    return {box.tip.partition(",")[0]: box for box in boxes(svg)}


def test_a_stage_is_a_column_and_blocks_link_to_their_drawings_and_carry_the_mark_of_se() -> None:
    svg = drawn(network_of(inspected("residual")))
    assert [a.get("href") for a in svg.iter("a")] == [f"#block-{i}" for i in range(2, 6)]
    assert [t.text for a in svg.iter("a") for t in a.iter("text") if t.get("class") == "badge"] == ["SE"] * 4
    assert sum(p.get("class") == "skip" for p in svg.iter("path")) == 4  # the blocks' own
    found = named(svg)
    assert found["layer2.1"].text == ["layer2.1", "BasicBlock \u00b7 128", "SE"]
    assert found["conv1 to maxpool"].text == ["conv1 \u2013 maxpool", "4 layers \u00b7 64"]
    assert found["layer2.0"].x == found["layer2.1"].x > found["layer1.0"].x
    assert found["layer2.0"].y < found["layer2.1"].y
    assert found["layer2.0"].y == found["layer3.0"].y  # nothing skips a stage: all begin at the top


@pytest.mark.parametrize("name", ["unet", "dense"])
def test_no_box_lies_on_another_and_in_a_u_net_smaller_maps_stand_lower(name: str) -> None:
    svg = drawn(network_of(inspected(name)))
    corners = [(box.x, box.y) for box in boxes(svg) if box.role != "join"]
    width, height = (float(next(svg.iter("rect")).get(key, "")) for key in ("width", "height"))
    assert all(0 <= x <= float(svg.get("width", "")) - width for x, _ in corners)
    assert all(0 <= y <= float(svg.get("height", "")) - height for _, y in corners)
    for (x, y), (u, v) in combinations(corners, 2):
        assert abs(x - u) >= width or abs(y - v) >= height
    if name == "unet":
        found = named(svg)
        assert found["d1.net"].text == ["d1.net", "DoubleConv \u00b7 8", "2 SE"]
        assert found["d1.net"].y < found["d2.net"].y < found["bottom.net"].y > found["decoder.u2.net"].y


def points_on(path: str) -> Iterator[tuple[int, int]]:
    """Points on a line of a picture, close together."""
    x = y = 0.0
    for step in re.findall("[A-Z][^A-Z]*", path):
        numbers = [float(number) for number in re.findall(r"[\d.]+", step)]
        to = {"H": [*numbers, y], "V": [x, *numbers]}.get(step[0], numbers)
        bends = to if len(to) == 6 else [x, y, *to, *to]
        for t in [] if step[0] == "M" else [i / 50 for i in range(51)]:
            weights = torch.tensor([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
            yield tuple((weights @ torch.tensor([x, y, *bends]).view(4, 2)).round().int().tolist())
        x, y = to[-2:]


def test_connections_lead_past_boxes_also_where_two_images_take_the_same_stages() -> None:
    images = (example(), torch.empty_like(example()))
    svg = drawn(network_of(inspect_se(add_se(Siamese(), example_inputs=images), images)))
    width, height = (float(next(svg.iter("rect")).get(key, "")) for key in ("width", "height"))
    places = [(box.x, box.y) for box in boxes(svg) if box.role != "join"]
    lines = [path.get("d", "") for path in svg.iter("path") if path.get("class") == "flow"]
    between = [path for path in lines if "C" in path]
    assert len(between) == 8
    for x, y in (point for path in between for point in points_on(path)):
        assert not any(left < x < left + width and top < y < top + height for left, top in places)


def test_names_are_text_not_markup() -> None:
    node = Node("<b>", "A & B", "module", None, 0, False, (3, 8, 8), (8, 8))
    text = picture(Network([node], []), {}).svg("the network")
    assert "<b>" not in text
    assert re.search("&lt;b&gt;, A &amp; B", text)


def test_a_long_computation_on_vectors_at_the_end_is_one_node() -> None:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.one, self.two = BasicBlock(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.block(x).mean((2, 3))
            one, two = self.one(x), self.two(x)
            for _ in range(12):
                one = one + two
            return one

    inspection = inspect_se(add_se(Selects(), example_inputs=torch.empty(2, 8, 8, 8)))
    network = network_of(inspection)
    assert [node.name for node in network.nodes] == ["input", "block", "one", "two", "12 operations"]
    assert [node.name for node in network.nodes[-1].taken] == ["one", "two"]
