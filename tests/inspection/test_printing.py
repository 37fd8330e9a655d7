"""What is printed is what someone who knows the paper wants to see."""

from __future__ import annotations

import inspect
import io
import textwrap

import pytest
from inspected import PlainNet, retrofitted, small_resnet
from torch import fx
from torchvision.models.resnet import BasicBlock

from se_retrofit import add_se, inspect_se, plan_of
from se_retrofit.inspection.lines import Line, Lines


def lines_of(model: object, block: str | None = None) -> list[str]:
    return str(inspect_se(model).graph(block)).splitlines()  # type: ignore[arg-type]


def test_the_tree_folds_what_repeats_and_marks_what_has_se() -> None:
    lines = lines_of(retrofitted("tv/densenet121"))
    assert len(lines) < 50  # of 58 layers, one is shown
    folded = [line for line in lines if " .. " in line]
    assert len(folded) == 4
    assert all(line.startswith("> ") and line.endswith("with SE 32 -> 4 -> 32") for line in folded)
    (first,) = [line for line in lines if "after conv2 (Conv2d)" in line]
    assert first.startswith("> ")


def test_the_tree_folds_no_chain() -> None:
    lines = lines_of(retrofitted("tv/vgg16_bn"))
    assert sum("SE " in line and line.startswith("> ") for line in lines) == 13


@pytest.mark.sweep
def test_every_site_is_in_the_tree() -> None:
    for name in ("tv/googlenet", "tv/convnext_tiny"):
        model = retrofitted(name)
        text = "\n".join(lines_of(model))
        for site in plan_of(model).sites:
            assert model.get_submodule(site.path).summary() in text


def test_a_blocks_source_is_its_authors_with_the_call_of_se_marked() -> None:
    model = add_se(small_resnet())
    lines = lines_of(model, "layer1.0")
    author = textwrap.dedent(inspect.getsource(BasicBlock.forward)).splitlines()
    shown = lines[lines.index("  layer1.0, BasicBlock.forward:") + 1 :]
    assert [line[2:] for line in shown if not line.startswith(">")] == [
        line for line in author if "self.bn2(" not in line
    ]
    (marked,) = [line for line in shown if line.startswith(">")]
    assert "self.se_attention(self.bn2(" in marked
    assert sum(line.startswith(">") for line in lines) == 3  # the headline, the node and the line of source


def test_a_block_without_a_module_of_its_own_is_printed_too() -> None:
    lines = lines_of(add_se(PlainNet()), "conv1")
    assert lines[1].startswith("> SE 8 -> 4 -> 8 after relu, before ")
    assert any("call_module" in line and line.startswith(">") for line in lines)


def test_a_block_of_a_traced_network_is_printed_with_the_generated_code() -> None:
    lines = lines_of(add_se(fx.symbolic_trace(small_resnet())), "layer2.0")
    assert any(line.startswith(">") and 'getattr(self.layer2, "0").se_attention(' in line for line in lines)
    assert any("def forward(self, x" in line for line in lines)


def test_colour_in_a_terminal_only() -> None:
    from rich.console import Console

    pipe, terminal = io.StringIO(), io.StringIO()
    lines = Lines([Line("plain"), Line("about SE", se=True)])
    lines.show(pipe)
    lines.show(console=Console(file=terminal, force_terminal=True))
    assert pipe.getvalue() == "  plain\n> about SE\n"
    assert "\x1b[" in terminal.getvalue()


def test_names_with_brackets_are_printed_as_they_are() -> None:
    out = io.StringIO()
    Lines([Line("[bold]cat[/bold] [x, y]")]).show(out)
    assert out.getvalue() == "  [bold]cat[/bold] [x, y]\n"


def test_the_difference_is_one_line_of_the_authors_source() -> None:
    lines = [line.text for line in inspect_se(add_se(small_resnet())).diff("layer1.0")]
    removed, added = [line for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    assert removed.startswith("-")
    assert added == removed.replace("-", "+", 1).replace("self.bn2(", "self.se_attention(self.bn2(") + ")"


@pytest.mark.parametrize(
    ("name", "block", "added"),
    [
        ("tv/mobilenet_v2", "features.3", "(se_attention): SEAttention(144"),
        ("tv/googlenet", "inception3a", "return self.se_attention(torch.cat(outputs, 1))"),
        ("tv/vgg16_bn", "features.0", "return self.se_attention(F.relu(input, inplace=self.inplace))"),
    ],
)
def test_differences_of_containers_branches_and_chains(name: str, block: str, added: str) -> None:
    lines = [line.text for line in inspect_se(retrofitted(name)).diff(block)]
    (line,) = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert added in line
