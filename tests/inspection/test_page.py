"""The page is one file that opens anywhere, and asks nothing of anyone."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inspected import example, inspected, small_resnet

from se_retrofit import add_se, inspect_se
from se_retrofit.inspection.page import page


@pytest.fixture(scope="module")
def text() -> str:
    return page(inspected("residual"), inspected("residual").report())


class Linked(HTMLParser):
    """The ids in a page, and what it refers to: within it, and outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        styles = re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", text)
        self.references = [a or b for a, b in styles]
        self.feed(text)
        self.inner = [r for r in self.references if r.startswith("#")]
        self.outer = [r for r in self.references if not r.startswith(("#", "data:"))]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        kinds = ("src", "href", "xlink:href", "action", "data")
        self.references += [value or "" for name, value in attrs if name in kinds]


def test_it_holds_summary_table_differences_drawings_and_reasons(text: str, tmp_path: Path) -> None:
    report = inspected("residual").report()
    assert inspected("residual").write_html(tmp_path / "a.html").read_text() == text
    rows = re.findall(r"<tr><td(.*?)</tr>", text)
    for row, shown in zip(report.rows, rows, strict=True):
        cells = re.findall(r">([^<]*)</(?:td|a)>", html.unescape(shown.replace("<wbr>", "")))
        assert cells[:2] == [row.block, row.cls]
        assert {row.after, f"{row.parameters:,}", f"{row.multiply_adds:,}"} < set(cells)
    assert "<code>layer4.0</code>: excluded" in text
    assert re.search(r'<span class="add">\+ +(\w+) = self\.se_attention\(self\.bn2\(\1\)\)</span>', text)
    assert re.search(r'<span class="del">- +(\w+) = self\.bn2\(\1\)</span>', text)
    assert "SE 64 -> 4 -> 64 after bn2 (BatchNorm2d), before +=" in html.unescape(text)
    assert text.count('<div class="side">') == 2 * 2
    resized = page(inspected("residual"), replace(report, resized="3x64x64"))
    assert f"one {report.inputs} input, resized to 3x64x64" in resized


def test_what_is_no_difference_is_not_coloured_as_one(text: str) -> None:
    cards = dict(re.findall(r'<div class="more([^"]*)">([^<]*)</div>', text))
    assert [(cls, more[0]) for cls, more in re.findall(r'<div class="more([^"]*)">([^<]*)', text)] == [
        (" change", "+"),
        ("", "1"),  # 100.00% of all
        (" change", "+"),
    ]
    assert cards[""] == "100.00% of all"


def test_rows_and_the_picture_link_to_blocks_that_are_there_and_to_nothing_outside(text: str) -> None:
    found = Linked(text)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.inner} == {"block-1", "block-2"} <= set(found.ids)
    assert len(found.inner) == 2 * 4  # the table and the picture
    assert found.outer == []
    control = '<img src="https://example.org/a.png"><style>@import x.css</style>'
    assert len(Linked(control).outer) == 2  # the check sees what it should


def test_dark_screens_are_provided_for(text: str) -> None:
    light, dark = (set(re.findall(r"(--[\w-]+): #", part)) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL))
    assert light == dark  # each colour has its dark one
    assert "@media (prefers-color-scheme: dark)" in text
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--legible"} == light
    rules = re.sub(r":root \{.*?\}", "", text[: text.index("</style>")], flags=re.DOTALL)
    assert re.findall(r"#[0-9a-f]{3,6}\b", rules) == []  # no colour but by its name


def test_names_are_text_not_markup() -> None:
    model = add_se(small_resnet())
    type(model).__name__, name = "<b>Net</b>", type(model).__name__
    try:
        inspection = inspect_se(model, example())
        text = page(inspection, inspection.report())
    finally:
        type(model).__name__ = name
    assert "<b>Net" not in text
    assert "&lt;b&gt;Net&lt;/b&gt;" in text
