"""The graphs show SE where it is, what they show is what runs, and every view shows the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inspected import NETWORKS, Twice, UNet, example, inspected, small_resnet
from networks import assert_untouched, random_states, randomise_se, randomised, snapshot
from rich.console import Console
from torch import fx

from se_retrofit import RetrofitError, add_se, fuse_se, inspect_se, record, remove_se
from se_retrofit.cli.inspect import show
from se_retrofit.inspection.graphs import blocks_of


@pytest.mark.parametrize(
    ("name", "block", "after", "before"),
    [
        # residual: the branch's last norm, before the addition (figure 3)
        ("bottleneck", "layer1.0", "bn3 (BatchNorm2d)", "+="),
        # residual with layer scale: before it; the permutation in between is no layer
        ("scaled", "features.1.0", "block.5 (Linear)", "* layer_scale"),
        # inverted bottleneck: between the depthwise conv's activation and the projection
        ("inverted", "features.2", "conv.1.2 (ReLU6)", "conv.2 (Conv2d)"),
        # dense layer: the new features, which the dense block concatenates
        ("dense", "features.denseblock1.denselayer2", "conv2 (Conv2d)", "the block's end"),
        # Inception: the whole module (figure 2)
        ("branches", "0", "cat", "the block's end"),
        # plain chain: after each non-linearity
        ("chain", "features.0", "features.2 (ReLU)", "the block's end"),
        ("functions", "conv1", "relu", "the block's end"),
        ("traced", "layer2.0", "layer2.0.bn2 (BatchNorm2d)", "+"),
    ],
)
def test_se_is_seen_where_the_paper_puts_it(name: str, block: str, after: str, before: str) -> None:
    pair = inspected(name).block(block)
    (site,) = pair.sites
    assert (pair.se_after(site), pair.se_before(site)) == (after, before)
    node = pair.se_node(site)
    assert node is not None
    assert pair.after.kind(node) == "SEAttention"
    assert str(site.channels) in pair.after.shape(node).split("x")
    if name == "scaled":  # what passes its input on stands where it is called
        nodes = {node.name: node for node in pair.after.graph.nodes}
        assert [str(n) for n in nodes["stochastic_depth"].all_input_nodes] == ["mul"]
        assert [str(n) for n in nodes["add"].all_input_nodes] == ["stochastic_depth", "x"]


def test_a_double_convolution_is_one_block_with_the_names_of_its_layers() -> None:
    pair = inspected("unet").block("d1.net")
    assert (pair.cls, [pair.se_after(site) for site in pair.sites]) == ("DoubleConv", ["net.2 (ReLU)", "net.5 (ReLU)"])
    assert [pair.se_before(site) for site in pair.sites] == ["net.3 (Conv2d)", "the block's end"]
    assert [n.name for n in pair.after.graph.nodes][1:4] == ["net_0", "net_1", "net_2"]


@pytest.mark.parametrize(
    ("name", "block", "paths"),
    [
        ("unet", "d1.net", ["d1", "d1.net.4", "d1.net.2.se_attention", "d1.net.se_attention"]),
        ("residual", "layer2.1", ["layer2.1.se_attention", "layer2.1.conv1", "layer2.1.relu"]),
        ("residual", "layer3.0", ["layer3"]),
    ],
)
def test_a_block_is_found_by_its_path_or_by_one_in_it_or_around_it_alone(
    name: str, block: str, paths: list[str]
) -> None:
    inspection = inspected(name)
    assert [inspection.block(path) for path in paths] == [inspection.block(block)] * len(paths)


def test_blocks_that_are_parts_of_a_graph_have_their_own_operations_alone() -> None:
    after = inspected("functions").block("conv2").after
    kinds = [after.kind(node) for node in after.graph.nodes]
    assert kinds == ["placeholder", "Conv2d", "relu", "SEAttention", "output"]
    after = inspected("traced").block("layer2.0").after
    targets = [str(node.target) for node in after.graph.nodes if node.op == "call_module"]
    assert all(target.startswith("layer2.0.") for target in targets)
    assert {"layer2.0.conv1", "layer2.0.downsample.0", "layer2.0.relu"} <= set(targets)


@pytest.mark.parametrize(
    ("name", "block", "size"),
    [
        ("residual", "layer2.0", (64, 8, 8)),
        ("inverted", "features.3", (16, 8, 8)),
        ("dense", "features.denseblock1.denselayer1", (16, 8, 8)),
        ("branches", "1", (32, 8, 8)),  # with modules that stay closed
        ("scaled", "features.1.0", (16, 8, 8)),  # with a view of a parameter
        ("split", "stage2.1", (16, 8, 8)),  # a function has two results
    ],
)
def test_before_and_after_compute_what_the_block_does_without_and_with_se(
    name: str, block: str, size: tuple[int, ...]
) -> None:
    # gates of 1 would hide a graph without SE, and so would layer scales close to 0
    model = randomise_se(add_se(randomised(NETWORKS[name]()), example_inputs=example()).eval())
    pair = inspect_se(model, example()).block(block)
    x = torch.randn(2, *size)
    given = [x] if name == "dense" else x  # a list of tensors, each of them an input of the graph
    outputs = []
    for graph, network in ((pair.after.graph, model), (pair.before.graph, remove_se(model))):
        module = network.get_submodule(block)
        outputs.append(module(given))
        assert torch.equal(fx.GraphModule(module, graph)(x), outputs[-1])
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(("name", "number"), [("bottleneck", 2), ("dense", 1), ("inverted", 3), ("unet", 1)])
def test_blocks_of_one_structure_are_one_group(name: str, number: int) -> None:
    groups = inspected(name).distinct()
    assert len(groups) == number
    assert sum(map(len, groups)) == len(inspected(name).blocks)
    if name == "dense":  # a layer that is given several maps stands for the others
        assert groups[0][0].path == "features.denseblock1.denselayer2"


def test_what_is_not_called_has_a_row_and_no_block() -> None:
    class Sometimes(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.stem(x)) if x.shape[-1] > 8 else self.stem(x)

    model = add_se(Sometimes(), example_inputs=example())
    found = inspect_se(model, example(8))
    assert found.blocks == []
    (row,) = found.report().rows
    assert (row.cls, row.shape, row.multiply_adds) == ("BasicBlock", (), None)
    assert inspected("twice").block("block").calls == 2
    assert "called 2 times" in str(inspected("twice").graph("block"))


# Views ----------------------------------------------------------------------------------------------------------------


def test_all_views_come_from_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bool] = []
    monkeypatch.setattr(
        "se_retrofit.inspection.inspection.record", lambda *args, **kw: recorded.append(True) or record(*args, **kw)
    )
    inspection = inspect_se(add_se(small_resnet()))
    assert repr(inspection) == "<Inspection of ResNet: 5 SE modules in 5 blocks>"
    assert str(inspection) == str(inspection.report())
    views = [inspection.graph(), inspection.graph("layer1.0"), inspection.diff(), inspection.diff("layer1.0")]
    assert all(str(view) for view in views)
    assert inspection.draw(tmp_path / "a.svg").exists()
    assert inspection.write_html(tmp_path / "a.html").exists()
    assert inspection.to_dict()["rows"]
    assert recorded == [True]


def test_neither_the_record_nor_the_plan_is_gone_through_again_for_each_block() -> None:
    class Counted(list[Any]):
        walks = 0

        def __iter__(self) -> Iterator[Any]:
            Counted.walks += 1
            return super().__iter__()

    found = inspected("bottleneck")
    again = record(found.model, example())
    again.ops, again.calls = Counted(again.ops), Counted(again.calls)
    assert len(blocks_of(found.model, found.plan, again)) == len(found.blocks) == 5
    assert Counted.walks <= 3
    se = found.model.get_submodule(found.plan.sites[0].path)
    assert copy.deepcopy(se).plan is se.plan


def test_the_networks_graph_says_what_each_block_gives_and_takes() -> None:
    rows = [line.split("  ") for line in inspected("unet").graph().splitlines()]
    rows = [[cell for cell in row if cell] for row in rows if len(row) > 2][1:]
    assert [row[0].removeprefix("> ") for row in rows][:5] == ["input", "d1.net", "pool", "d2.net", "pool (2)"]
    table = {row[0].removeprefix("> "): row[1:] for row in rows}
    assert [cell.strip() for cell in table["d1.net"]] == ["DoubleConv, 2 x SE 8 -> 4 -> 8", "8x64x64"]
    assert [cell.strip() for cell in table["cat (2)"]] == ["16x64x64", "d1.net, decoder.up1"]
    marked = [line for line in inspected("residual").graph().splitlines() if line.startswith("> ")]
    assert [line.split()[1] for line in marked] == [f"layer{block}" for block in ("1.0", "2.0", "2.1", "3.0")]
    assert all("after bn2 (BatchNorm2d)" in line for line in marked)


def test_a_blocks_graph_is_a_table_with_the_mark_at_se() -> None:
    lines = str(inspected("residual").graph("layer2.0")).splitlines()
    assert lines[1] == "> SE 128 -> 8 -> 128 after bn2 (BatchNorm2d), before +="
    (node,) = [line for line in lines if line.startswith("> call_module")]
    assert node.split()[2:5] == ["se_attention", "se_attention", "bn2"]
    assert node.endswith("128x8x8")
    assert len(lines) == 4 + len(inspected("residual").block("layer2.0").after.graph.nodes)


@pytest.mark.parametrize(
    ("name", "block", "added"),
    [
        ("residual", "layer1.0", "out = self.se_attention(self.bn2(out))"),
        ("inverted", "features.3", "(se_attention): SEAttention(96"),
        ("branches", "1", "return self.se_attention(torch.cat(outputs, 1))"),
        ("chain", "features.0", "return self.se_attention(F.relu(input, inplace=self.inplace))"),
        ("traced", "layer2.0", 'getattr(self.layer2, "0").se_attention('),
    ],
)
def test_the_diff_is_one_line_of_the_authors_source(name: str, block: str, added: str) -> None:
    lines = inspected(name).diff(block).splitlines()
    changed = [line for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    assert any(added in line for line in changed if line.startswith("+"))
    if name == "residual":
        assert changed[0][1:] == changed[1][1:].replace("self.se_attention(self.bn2(out))", "self.bn2(out)")
        text = str(inspected(name).diff())
        assert text.count("+++ ") == 2
        assert "like it: layer2.1" in text


def test_colour_in_a_terminal_only_and_columns_are_left_out_where_it_is_narrow() -> None:
    pipe, lines = io.StringIO(), "  plain [bold]x[/bold]\n> about SE\n"
    show(Console(file=pipe), lines)
    assert pipe.getvalue() == lines
    found = inspected("residual")
    assert all(line == line.rstrip() for line in str(found).splitlines())
    shown = {}
    for width, coloured in ((80, False), (160, True)):
        terminal = io.StringIO()
        console = Console(file=terminal, force_terminal=coloured, width=width)
        show(console, lines)
        console.print(found)
        shown[width] = terminal.getvalue()
    assert "\x1b[" in shown[160]
    assert "\x1b" not in shown[80] + str(found)
    assert max(map(len, shown[80].splitlines())) <= 80 < len(str(found).splitlines()[2])
    for cell in ("layer2.1", "bn2 (BatchNorm2d)", "128x8x8", "2,048"):
        assert all(cell in text for text in (*shown.values(), str(found)))
    assert "residual" in shown[160]
    assert "residual" not in shown[80]


def test_mistakes_say_what_to_do(tmp_path: Path) -> None:
    found = inspected("residual")
    views: list[Callable[[str], object]] = [found.block, found.graph, found.diff]
    for view in (*views, lambda block: found.draw(tmp_path / "a.svg", block)):
        with pytest.raises(RetrofitError, match="layer7"):
            view("layer7")
    assert list(tmp_path.iterdir()) == []
    for wrong, error, told in (
        (lambda: found.block("layer2"), RetrofitError, r"layer2\.0, layer2\.1"),
        (lambda: found.block("layer3.0.conv9"), RetrofitError, "conv9"),
        (lambda: found.block("layer9"), RetrofitError, r"layer1\.0"),
        (lambda: inspect_se(small_resnet()), RetrofitError, "add_se"),
        (lambda: inspect_se("resnet18"), TypeError, "str"),  # type: ignore[arg-type]
        (lambda: inspect_se(found.model, torch.empty(1, 4, 32, 32)), RetrofitError, "example_inputs"),
        (lambda: inspect_se(fuse_se(add_se(small_resnet()))), RetrofitError, "unfuse_se"),
    ):
        with pytest.raises(error, match=told):
            wrong()


def test_looking_changes_nothing() -> None:
    model = add_se(UNet(), example_inputs=example())
    model.d1.eval()
    before, states = snapshot(model), list(random_states())
    inspect_se(model).report()
    assert_untouched(model, before)
    assert list(random_states()) == states
