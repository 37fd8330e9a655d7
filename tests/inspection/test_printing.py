"""What is printed is what someone who knows the paper wants to see; golden files hold three of the printouts.

To write them anew after a change that is meant: UPDATE_GOLDEN=1 pytest tests/inspection/test_printing.py
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from inspected import PlainNet, retrofitted, small_resnet

from se_retrofit import RetrofitError, add_se, print_graph, report
from se_retrofit.inspection import difference, print_difference
from se_retrofit.inspection.lines import Line, show

GOLDEN = Path(__file__).parent / "golden"


def printed(name: str, block: str) -> str:
    model, out = retrofitted(name), io.StringIO()
    out.write(f"{report(model)}\n\n")
    print_graph(model, file=out)
    out.write("\n")
    print_graph(model, block, file=out)
    out.write("\n")
    print_difference(model, block, file=out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "block"), [("tv/resnet50", "layer1.0"), ("tv/mobilenet_v2", "features.3"), ("timm/dla34", "level2.tree2")]
)
def test_printouts_are_the_golden_ones(name: str, block: str) -> None:
    golden = GOLDEN / f"{name.split('/')[1]}.txt"
    text = printed(name, block)
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def lines_of(model: object, block: str | None = None) -> list[str]:
    out = io.StringIO()
    print_graph(model, block, file=out)  # type: ignore[arg-type]
    return out.getvalue().splitlines()


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


def test_every_site_is_in_the_tree() -> None:
    for name in ("tv/googlenet", "tv/convnext_tiny"):
        model = retrofitted(name)
        text = "\n".join(lines_of(model))
        for row in report(model).rows:
            assert f"SE {row.channels} -> {row.hidden} -> {row.channels}" in text


def test_a_blocks_code_is_the_code_that_runs() -> None:
    model = add_se(small_resnet())
    lines = lines_of(model, "layer1.0")
    code = [line[2:] for line in lines[lines.index("  the forward that was generated:") + 1 :]]
    source = type(model.layer1[0]).se_source.strip().splitlines()
    assert [line.split(";")[0].rstrip() for line in code] == [line.split(";")[0].rstrip() for line in source]
    marked = [line for line in lines if line.startswith(">")]
    assert len(marked) == 3  # the headline, the node and the line of code


def test_a_block_without_a_module_of_its_own_is_printed_too() -> None:
    lines = lines_of(add_se(PlainNet()), "conv1")
    assert lines[1].startswith("> SE 8 -> 4 -> 8 after relu, before ")
    assert any("call_module" in line and line.startswith(">") for line in lines)


def test_colour_in_a_terminal_only() -> None:
    from rich.console import Console

    pipe, terminal = io.StringIO(), io.StringIO()
    lines = [Line("plain"), Line("about SE", se=True)]
    show(lines, pipe)
    show(lines, console=Console(file=terminal, force_terminal=True))
    assert pipe.getvalue() == "  plain\n> about SE\n"
    assert "\x1b[" in terminal.getvalue()


def test_names_with_brackets_are_printed_as_they_are() -> None:
    out = io.StringIO()
    show([Line("[bold]cat[/bold] [x, y]")], out)
    assert out.getvalue() == "  [bold]cat[/bold] [x, y]\n"


def test_the_difference_is_the_se_and_what_takes_its_value() -> None:
    text = difference(add_se(small_resnet()), "layer1.0")
    changed = [line for line in text.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert sorted(changed) == [
        "+    se_attention += x;  iadd = se_attention",
        "+    se_attention = self.se_attention(bn2)",
        "-    bn2 += x;  iadd = bn2",
    ]


def test_no_such_block() -> None:
    with pytest.raises(RetrofitError, match="no retrofitted block 'layer7'"):
        print_graph(add_se(small_resnet()), "layer7")
    with pytest.raises(RetrofitError, match="no retrofitted block 'layer7'"):
        difference(add_se(small_resnet()), "layer7")
