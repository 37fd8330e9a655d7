"""One object has every view of a retrofitted network, and what is printed is what someone who knows the paper wants to see."""

from __future__ import annotations

import inspect
import io
import textwrap
from pathlib import Path

import pytest
from inspected import PlainNet, inspected, retrofitted, small_resnet
from rich.console import Console
from torch import fx
from torchvision.models.resnet import BasicBlock

from se_retrofit import RetrofitError, add_se, inspect_se, plan_of
from se_retrofit.inspection import Inspection, graphs
from se_retrofit.inspection.lines import Line, Lines


def lines_of(inspection: Inspection, block: str | None = None) -> list[str]:
    return str(inspection.graph(block)).splitlines()


def test_all_views_come_from_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bool] = []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args, **kw: recorded.append(True) or record(*args, **kw))
    inspection = inspect_se(add_se(small_resnet()))
    assert repr(inspection) == "<Inspection of ResNet: 5 SE modules in 5 blocks>"
    assert str(inspection) == str(inspection.report())
    views = [inspection.graph(), inspection.graph("layer1.0"), inspection.diff(), inspection.diff("layer1.0")]
    assert all(str(view) for view in views)
    assert inspection.draw(tmp_path / "a.svg").exists()
    assert inspection.write_html(tmp_path / "a.html").exists()
    assert inspection.to_dict()["rows"]
    assert len(recorded) == 2  # with SE and without


def test_every_view_of_a_block_refuses_one_that_is_not_there(tmp_path: Path) -> None:
    found = inspected("small")
    for view in (found.block, found.graph, found.diff, lambda block: found.draw(tmp_path / "a.svg", block)):
        with pytest.raises(RetrofitError, match="no retrofitted block 'layer7'"):
            view("layer7")
    assert list(tmp_path.iterdir()) == []


def test_the_tree_folds_what_repeats_and_marks_what_has_se() -> None:
    lines = lines_of(inspected("tv/densenet121"))
    assert len(lines) < 50  # of 58 layers, one is shown
    folded = [line for line in lines if " .. " in line]
    assert len(folded) == 4
    assert all(line.startswith("> ") and line.endswith("with SE 32 -> 4 -> 32") for line in folded)
    (first,) = [line for line in lines if "after conv2 (Conv2d)" in line]
    assert first.startswith("> ")
    chain = lines_of(inspected("tv/vgg16_bn"))  # which is not folded
    assert sum("SE " in line and line.startswith("> ") for line in chain) == 13


@pytest.mark.sweep
def test_every_site_is_in_the_tree() -> None:
    for name in ("tv/googlenet", "tv/convnext_tiny"):
        model = retrofitted(name)
        text = "\n".join(lines_of(inspect_se(model)))
        for site in plan_of(model).sites:
            assert model.get_submodule(site.path).summary() in text


def test_a_blocks_source_is_its_authors_with_the_call_of_se_marked() -> None:
    lines = lines_of(inspected("small"), "layer1.0")
    author = textwrap.dedent(inspect.getsource(BasicBlock.forward)).splitlines()
    shown = lines[lines.index("  layer1.0, BasicBlock.forward:") + 1 :]
    unmarked = [line[2:] for line in shown if not line.startswith(">")]
    assert unmarked == [line for line in author if "self.bn2(" not in line]
    (marked,) = [line for line in shown if line.startswith(">")]
    assert "self.se_attention(self.bn2(" in marked
    assert sum(line.startswith(">") for line in lines) == 3  # the headline, the node and the line of source


def test_blocks_without_a_module_of_their_own_and_of_traced_networks_are_printed_too() -> None:
    lines = lines_of(inspect_se(add_se(PlainNet())), "conv1")
    assert lines[1].startswith("> SE 8 -> 4 -> 8 after relu, before ")
    assert any("call_module" in line and line.startswith(">") for line in lines)
    lines = lines_of(inspect_se(add_se(fx.symbolic_trace(small_resnet()))), "layer2.0")
    assert any(line.startswith(">") and 'getattr(self.layer2, "0").se_attention(' in line for line in lines)
    assert any("def forward(self, x" in line for line in lines)


def test_colour_in_a_terminal_only() -> None:
    pipe = io.StringIO()
    lines = Lines([Line("plain [bold]x[/bold]"), Line("about SE", se=True)])
    lines.show(pipe)
    assert pipe.getvalue() == "  plain [bold]x[/bold]\n> about SE\n"
    found = inspected("small")
    assert "\x1b" not in str(found)
    assert all(line == line.rstrip() for line in str(found).splitlines())
    for show in (lines.show, lambda console: console.print(found)):
        terminal = io.StringIO()
        show(console=Console(file=terminal, force_terminal=True, width=160))
        assert "\x1b[" in terminal.getvalue()
    for cell in ("layer2.1", "bn2 (BatchNorm2d)", "128x28x28"):
        assert cell in str(found)
        assert cell in terminal.getvalue()


def test_the_diff_is_one_line_of_the_authors_source_for_each_distinct_block() -> None:
    lines = [line.text for line in inspected("small").diff("layer1.0")]
    removed, added = [line for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    assert added == removed.replace("-", "+", 1).replace("self.bn2(", "self.se_attention(self.bn2(") + ")"
    text = str(inspected("tv/resnet50").diff())
    assert text.count("+++ ") == 2
    assert "+++ layer1.0, Bottleneck.forward with SE" in text
    assert "like it: layer2.0, layer3.0, layer4.0" in text


@pytest.mark.parametrize(
    ("name", "block", "added"),
    [
        ("tv/mobilenet_v2", "features.3", "(se_attention): SEAttention(144"),
        ("tv/googlenet", "inception3a", "return self.se_attention(torch.cat(outputs, 1))"),
        ("tv/vgg16_bn", "features.0", "return self.se_attention(F.relu(input, inplace=self.inplace))"),
    ],
)
def test_diffs_of_containers_branches_and_chains(name: str, block: str, added: str) -> None:
    lines = [line.text for line in inspected(name).diff(block)]
    (line,) = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert added in line
