"""Drawings show SE between its neighbours, and need Graphviz only where they say so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from inspected import retrofitted, small_resnet

from se_retrofit import RetrofitError, add_se, inspect_se

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")


def edges(source: str) -> list[tuple[str, str]]:
    return re.findall(r'^\s*"?(\w+)"? -> "?(\w+)"?', source, re.MULTILINE)


def test_dot_shows_each_distinct_block_before_and_after_with_shapes(tmp_path: Path) -> None:
    source = inspect_se(retrofitted("tv/resnet50")).draw(tmp_path / "a.dot").read_text()
    assert source.count("label=before") == source.count("label=after") == 2
    assert "layer1.0: Bottleneck, residual\nlike it: layer2.0, layer3.0, layer4.0" in source
    assert 'label=" 256\u00d756\u00d756 "' in source
    assert ("0_after_bn3", "0_after_se_attention") in edges(source)
    assert ("0_after_se_attention", "0_after_add") in edges(source)
    # before, the way leads through a gap in its place, so that the two are in line
    assert ("0_before_bn3", "0_before_se_attention") in edges(source)
    assert ("0_before_se_attention", "0_before_add") in edges(source)
    assert re.search(r'"?0_before_se_attention"? \[label=" *\n *" style=invis', source)
    assert source.count('label="SE 256 → 16 → 256') == 2  # nothing but the two after has it


def test_what_returns_several_tensors_is_one_box_whose_arrows_have_their_shapes(tmp_path: Path) -> None:
    source = inspect_se(retrofitted("tv/shufflenet_v2_x1_0")).draw(tmp_path / "a.dot", "stage2.1").read_text()
    assert "getitem" not in source
    assert source.count("label=split") == 2  # before and after
    assert '"0_after_split" -> "0_after_branch2_0" [label=" 58\u00d728\u00d728 "]' in source
    assert ("0_after_split", "0_after_cat") in edges(source)


def test_one_block_alone(tmp_path: Path) -> None:
    source = inspect_se(add_se(small_resnet())).draw(tmp_path / "a.gv", "layer2.0").read_text()
    assert source.count("label=after") == 1
    assert "layer2.0: BasicBlock" in source


@needs_dot
@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_pictures(suffix: str, magic: bytes, tmp_path: Path) -> None:
    path = inspect_se(add_se(small_resnet())).draw(tmp_path / f"a{suffix}")
    assert path == tmp_path / f"a{suffix}"
    assert path.read_bytes().startswith(magic)


def test_without_graphviz_it_says_how_to_get_it_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RetrofitError, match=r"apt install graphviz.*or give a path that ends in \.dot"):
        inspect_se(add_se(small_resnet())).draw(tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
    assert inspect_se(add_se(small_resnet())).draw(tmp_path / "a.dot").exists()


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    inspection = inspect_se(add_se(small_resnet()))
    with pytest.raises(RetrofitError, match=r"a\.jpg ends in no format that can be drawn: \.dot"):
        inspection.draw(tmp_path / "a.jpg")
    with pytest.raises(RetrofitError, match="no folder"):
        inspection.draw(tmp_path / "nowhere" / "a.dot")
    assert list(tmp_path.iterdir()) == []
