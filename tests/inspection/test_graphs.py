"""The graphs show SE where it is, and what they show is what runs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from inspected import PlainNet, Twice, UNet, inspected, retrofitted, small_resnet
from sweeps import swept
from torch import fx, nn

from se_retrofit import RetrofitError, add_se, inspect_se, record, remove_se


@pytest.mark.parametrize(
    ("name", "block", "after", "before"),
    [
        # residual: the branch's last norm, before the addition (figure 3)
        ("tv/resnet50", "layer1.0", "bn3 (BatchNorm2d)", "+="),
        ("timm/dla34", "level2.tree2", "bn2 (BatchNorm2d)", "+="),
        # residual with layer scale: before it
        ("tv/convnext_tiny", "features.1.0", "block.5 (Linear)", "* layer_scale"),
        # inverted bottleneck: between the depthwise conv's activation and the projection
        ("tv/mobilenet_v2", "features.2", "conv.1.2 (ReLU6)", "conv.2 (Conv2d)"),
        # dense layer: the new features, which the dense block concatenates
        ("tv/densenet121", "features.denseblock1.denselayer2", "conv2 (Conv2d)", "the block's end"),
        # Inception: the whole module (figure 2)
        ("tv/googlenet", "inception3a", "cat", "the block's end"),
        # plain chain: after each non-linearity
        ("tv/vgg16_bn", "features.40", "features.42 (ReLU)", "the block's end"),
    ],
)
def test_se_is_seen_where_the_paper_puts_it(name: str, block: str, after: str, before: str) -> None:
    pair = inspected(name).block(block)
    (site,) = pair.sites
    assert (pair.se_after(site), pair.se_before(site)) == (after, before)
    node = pair.se_node(site)
    assert node is not None
    assert pair.after is not None
    assert pair.after.kind(node) == "SEAttention"
    assert pair.after.shape(node).startswith(f"{site.channels}x")


def part_of(graph: fx.Graph, block: str) -> list[tuple[str, torch.Size | None]]:
    """Targets and shapes of what happens in a block, in the graph of a whole network. What happens in a module in it, other than
    an ``nn.Sequential``, is one row, with the last shape."""
    rows: dict[object, tuple[str, torch.Size | None]] = {}
    for node in graph.nodes:
        call, closed = node.meta.get("call"), None
        while call is not None and call.path != block:
            closed, call = (closed if type(call.module) is nn.Sequential else call), call.parent
        if call is not None:
            target = str(node.target) if closed is None else closed.path
            rows[closed or node] = target, node.meta.get("shape")
    return list(rows.values())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("tv/resnet50", "layer1.0"),  # with an opened nn.Sequential
        ("tv/googlenet", "inception3a"),  # with modules that stay closed
        ("timm/convnext_atto", "stages.0.blocks.0"),  # with a view of a parameter
        ("tv/shufflenet_v2_x1_0", "stage2.1"),  # with an operation that returns several tensors
    ],
)
def test_a_blocks_graph_is_a_part_of_the_graph_of_the_network(name: str, block: str) -> None:
    after = inspected(name).block(block).after
    assert after is not None
    shown = [
        (f"{block}.{n.target}" if n.op in ("call_module", "get_attr") else str(n.target), n.meta.get("shape"))
        for n in after.graph.nodes
        if n.op not in ("placeholder", "output")
    ]
    assert shown == part_of(record(retrofitted(name)).graph, block)
    assert any("se_attention" in target for target, _ in shown)


def test_a_module_that_passes_its_input_on_stands_where_it_is_called() -> None:
    after = inspected("tv/convnext_tiny").block("features.1.0").after
    assert after is not None
    nodes = {node.name: node for node in after.graph.nodes}
    assert [str(n) for n in nodes["stochastic_depth"].all_input_nodes] == ["mul"]
    assert [str(n) for n in nodes["add"].all_input_nodes] == ["stochastic_depth", "x"]


@pytest.mark.parametrize(
    "name",
    swept(
        ["tv/resnet50", "tv/mobilenet_v2", "tv/googlenet"],
        ["timm/dla34", "tv/convnext_tiny", "tv/densenet121", "tv/vgg16_bn"],
    ),
)
def test_after_differs_from_before_in_nothing_but_se(name: str) -> None:
    for pair in inspected(name).blocks:
        assert pair.failure is None
        assert pair.before is not None
        assert pair.after is not None
        assert pair.before.ses == []
        assert len(pair.after.ses) == len(pair.sites)

        def steps(graph: fx.Graph, left_out: list[fx.Node]) -> list[tuple[str, str]]:
            return [(node.op, str(node.target)) for node in graph.nodes if node not in left_out]

        assert steps(pair.before.graph, []) == steps(pair.after.graph, pair.after.ses)


@pytest.mark.parametrize(
    ("model", "block", "size"),
    [
        (small_resnet(), "layer2.1", (128, 8, 8)),
        (small_resnet(), "layer2.0", (64, 8, 8)),
        (torchvision.models.mobilenet_v2(width_mult=0.35), "features.3", (8, 8, 8)),
        (torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.0), "denselayer1", (8, 8, 8)),
        (torchvision.models.shufflenet_v2_x0_5(), "stage2.1", (48, 28, 28)),  # a function has two results
    ],
    ids=["residual", "projection", "inverted", "dense", "split"],
)
def test_a_graph_computes_what_its_block_does(model: nn.Module, block: str, size: tuple[int, ...]) -> None:
    inputs = torch.randn(2, *size) if isinstance(model, torchvision.models.densenet._DenseBlock) else None
    model = add_se(model, example_inputs=inputs).eval()
    for module in model.modules():
        if type(module).__name__ == "SEAttention":
            nn.init.normal_(module.fc[2].weight)  # gates of 1 would hide a graph without SE
    pair = inspect_se(model, inputs).block(block)
    assert pair.before is not None
    assert pair.after is not None
    x = torch.randn(2, *size)
    given = [x] if block.startswith("denselayer") else x  # a list of tensors, each of them an input of the graph
    for graph, network in ((pair.after.graph, model), (pair.before.graph, remove_se(model))):
        module = network.get_submodule(block)
        assert torch.equal(fx.GraphModule(module, graph)(x), module(given))


@pytest.mark.parametrize(
    ("name", "number"),
    [("tv/resnet50", 2), ("tv/densenet121", 1), ("tv/mobilenet_v2", 3), ("tv/vgg16_bn", 1)],
)
def test_blocks_of_one_structure_are_one_group(name: str, number: int) -> None:
    groups = inspected(name).distinct()
    assert len(groups) == number
    assert sum(map(len, groups)) == len(inspected(name).blocks)
    if name == "tv/densenet121":  # a layer that is given several maps stands for the others
        assert groups[0][0].path == "features.denseblock1.denselayer2"


def test_blocks_of_a_traced_network_are_parts_of_its_graph() -> None:
    traced = fx.symbolic_trace(small_resnet())
    pairs = {pair.path: pair for pair in inspect_se(add_se(traced)).blocks}
    pair = pairs["layer2.0"]
    assert list(pairs) == ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    assert pair.after is not None
    assert pair.se_after(pair.sites[0]) == "layer2.0.bn2 (BatchNorm2d)"
    targets = [str(node.target) for node in pair.after.graph.nodes if node.op == "call_module"]
    assert all(target.startswith("layer2.0.") for target in targets)
    assert "layer2.0.downsample.0" in targets


def test_a_chain_of_functions_is_cut_into_its_units() -> None:
    pairs = {pair.path: pair for pair in inspect_se(add_se(PlainNet())).blocks}
    assert list(pairs) == ["conv1", "conv2"]
    for path, pair in pairs.items():
        assert pair.after is not None
        kinds = [pair.after.kind(node) for node in pair.after.graph.nodes]
        assert kinds == ["placeholder", "Conv2d", "relu", "SEAttention", "output"]
        assert pair.se_after(pair.sites[0]) == "relu"
        assert next(str(n.target) for n in pair.after.graph.nodes if n.op == "call_module") == path


def test_a_block_is_found_by_its_path_or_its_ses() -> None:
    inspection = inspected("small")
    assert inspection.block("layer2.1") is inspection.block("layer2.1.se_attention")
    # or by a module in it, or one around it alone
    assert inspection.block("layer2.1.conv1").path == inspection.block("layer2.1.relu").path == "layer2.1"
    assert inspection.block("layer3").path == "layer3.0"
    for path, told in (("layer2", r"layer2\.0, layer2\.1"), ("layer3.0.conv9", "conv9"), ("layer9", r"layer1\.0")):
        with pytest.raises(RetrofitError, match=told):
            inspection.block(path)


def test_a_double_convolution_is_one_block_with_the_names_of_its_layers() -> None:
    example = torch.empty(1, 3, 32, 32)
    inspection = inspect_se(add_se(UNet(), example_inputs=example), example)
    pair = inspection.block("d1.net")
    for name in ("d1", "d1.net.4", "d1.net.2.se_attention", "d1.net.se_attention"):
        assert inspection.block(name) is pair
    assert (pair.cls, [pair.se_after(site) for site in pair.sites]) == ("DoubleConv", ["net.2 (ReLU)", "net.5 (ReLU)"])
    assert [pair.se_before(site) for site in pair.sites] == ["net.3 (Conv2d)", "the block's end"]
    assert pair.after is not None
    assert [n.name for n in pair.after.graph.nodes][1:4] == ["net_0", "net_1", "net_2"]
    assert len(inspection.distinct()) == 1


def test_a_block_called_twice_says_so() -> None:
    example = torch.empty(1, 3, 8, 8)
    assert inspect_se(add_se(Twice(), example_inputs=example), example).block("block").calls == 2
    assert inspected("tv/resnet18").block("layer1.0").calls == 1
