"""The picture of the whole network shows its blocks, what they take, and the connections that skip something."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from inspected import Box, PlainNet, Twice, UNet, boxes, inspected, small_resnet
from torch import fx
from torchvision.models.resnet import BasicBlock

from se_retrofit import add_se, inspect_se
from se_retrofit.inspection.network import Network, Node, network_of
from se_retrofit.inspection.picture import picture


def of(model: torch.nn.Module, example: torch.Tensor | None = None) -> Network:
    return network_of(inspect_se(add_se(model, example_inputs=example), example))


def skips(network: Network) -> list[tuple[str, str]]:
    return [(edge.source.name, edge.end.name) for edge in network.edges if edge.skips]


def test_a_residual_network_is_a_chain_of_blocks_that_have_bypasses() -> None:
    network = of(small_resnet())
    assert [(n.name, n.kind, n.ses, n.bypass) for n in network.nodes] == [
        ("input", "function", 0, False),
        ("conv1", "module", 0, False),
        *((f"layer{block}", "block", 1, True) for block in ("1.0", "2.0", "2.1", "3.0", "4.0")),
        ("avgpool", "module", 0, False),
    ]
    assert (network.nodes[1].last, network.nodes[-1].last) == ("maxpool", "fc")
    assert [(e.source, e.end) for e in network.edges] == list(zip(network.nodes, network.nodes[1:], strict=False))
    assert skips(network) == []


def test_the_skips_of_a_u_net_lead_past_what_is_below() -> None:
    network = of(UNet(), torch.empty(1, 3, 32, 32))
    joins = [n for n in network.nodes if n.kind == "join"]
    assert [n.name for n in joins] == ["cat", "cat"]
    found = [(e.source.name.partition(".")[0], joins.index(e.end)) for e in network.edges if e.skips]
    assert found == [("d2", 0), ("d1", 1)]
    assert sum(n.ses for n in network.nodes) == 10


def test_every_layer_of_a_dense_block_takes_all_before_it() -> None:
    network = network_of(inspected("tv/densenet121"))
    layers = [n for n in network.nodes if n.name.startswith("features.denseblock1.")]
    assert [sum(e.end is n for e in network.edges) for n in layers] == [1, 2, 3, 4, 5, 6]
    assert [sum(e.skips for e in network.edges if e.end is n) for n in layers] == [0, 1, 2, 3, 4, 5]
    assert not any(n.bypass for n in layers)  # what a layer gives is new; the concatenation is outside of it


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (fx.symbolic_trace(small_resnet()), ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]),
        (PlainNet(), ["conv1", "conv2"]),
        (Twice(), ["block", "block"]),
    ],
    ids=["traced", "functions", "twice"],
)
def test_blocks_that_are_parts_of_a_graph_and_blocks_called_twice_are_in_it(
    model: torch.nn.Module, names: list[str]
) -> None:
    network = of(model, torch.empty(1, 3, 32, 32))
    assert [n.name for n in network.nodes if n.kind == "block"] == names
    assert skips(network) == []


def test_where_the_network_itself_is_the_block_its_se_is_marked() -> None:
    example = torch.empty(2, 8, 8, 8)
    network = of(BasicBlock(8, 8), example)
    assert [(n.name, n.kind, n.ses) for n in network.nodes if n.ses] == [("se_attention", "block", 1)]
    assert [n.block.path for n in network.nodes if n.block is not None] == [""]
    assert skips(network) == [("input", "+")]
    assert inspect_se(add_se(BasicBlock(8, 8), example_inputs=example), example).report().model == "BasicBlock"


# As a picture ---------------------------------------------------------------------------------------------------------


def drawn(network: Network) -> ET.Element:
    links = {n.name: f"#block-{i}" for i, n in enumerate(network.nodes) if n.kind == "block"}
    return ET.fromstring(picture(network, links).svg("the network"))


def named(svg: ET.Element) -> dict[str, Box]:
    return {box.tip.partition(",")[0]: box for box in boxes(svg)}


def test_a_stage_is_a_column_and_blocks_link_to_their_drawings_and_carry_the_mark_of_se() -> None:
    svg = drawn(of(small_resnet()))
    assert [a.get("href") for a in svg.iter("a")] == [f"#block-{i}" for i in range(2, 7)]
    assert [t.text for a in svg.iter("a") for t in a.iter("text") if t.get("class") == "badge"] == ["SE"] * 5
    assert sum(p.get("class") == "skip" for p in svg.iter("path")) == 5  # the blocks' own
    found = named(svg)
    assert found["layer2.1"].text == ["layer2.1", "BasicBlock \u00b7 128", "SE"]
    assert found["conv1 to maxpool"].text == ["conv1 \u2013 maxpool", "4 layers \u00b7 64"]
    assert found["layer2.0"].x == found["layer2.1"].x > found["layer1.0"].x
    assert found["layer2.0"].y < found["layer2.1"].y
    assert found["layer2.0"].y == found["layer3.0"].y  # nothing skips a stage: all begin at the top


def test_in_a_u_net_smaller_maps_stand_lower() -> None:
    found = named(drawn(of(UNet(), torch.empty(1, 3, 32, 32))))
    assert found["d1.net"].text == ["d1.net", "DoubleConv \u00b7 8", "2 SE"]
    assert found["d1.net"].y < found["d2.net"].y < found["bottom.net"].y > found["u2.net"].y > found["u1.net"].y


def test_no_box_lies_on_another_and_all_are_within_the_picture() -> None:
    for network in (of(UNet(), torch.empty(1, 3, 32, 32)), network_of(inspected("tv/densenet121"))):
        svg = drawn(network)
        corners = [(box.x, box.y) for box in boxes(svg) if box.role != "join"]
        width, height = (float(next(svg.iter("rect")).get(key, "")) for key in ("width", "height"))
        assert all(0 <= x <= float(svg.get("width", "")) - width for x, _ in corners)
        assert all(0 <= y <= float(svg.get("height", "")) - height for _, y in corners)
        for i, (x, y) in enumerate(corners):
            assert all(abs(x - u) >= width or abs(y - v) >= height for u, v in corners[:i])


def test_names_are_text_not_markup() -> None:
    node = Node("<b>", "A & B", "module", None, 0, False, (3, 8, 8), (8, 8))
    text = picture(Network([node], []), {}).svg("the network")
    assert "<b>" not in text
    assert re.search("&lt;b&gt;, A &amp; B", text)
