"""The page is one file that opens anywhere, and asks nothing of anyone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from inspected import retrofitted, small_resnet

from se_retrofit import RetrofitError, add_se, inspect_se
from se_retrofit.inspection import Inspection
from se_retrofit.inspection.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# run in a copy of the page: what it fetched and what went wrong, where the test can read it
PROBE = """<script>
window.wrong = [];
addEventListener("error", (event) => window.wrong.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  const drawings = document.querySelectorAll(".side svg").length;
  location.hash = "#block-2";
  const opened = () => [...document.querySelectorAll("details.block")].map((block) => block.open);
  dispatchEvent(new HashChangeEvent("hashchange"));  // the event itself comes after the page has been dumped
  const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const found = {fetched, wrong: window.wrong, drawings, opened: opened(), overflow};
  document.body.dataset.probe = JSON.stringify(found);
});
</script>"""


def page_of(inspection: Inspection) -> str:
    return page(inspection, inspection.report())


class References(HTMLParser):
    """Whatever in a page may be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]


def references(text: str) -> list[str]:
    parser = References()
    parser.feed(text)
    styles = re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", text)
    return [r for r in (*parser.found, *(a or b for a, b in styles)) if not r.startswith(("data:", "#"))]


def test_it_holds_summary_table_differences_and_reasons(tmp_path: Path) -> None:
    model = add_se(small_resnet(), exclude="layer4.*")
    text = inspect_se(model).write_html(tmp_path / "a.html").read_text()
    plain = html.unescape(text)
    for row in inspect_se(model).report().rows:
        assert re.search(rf'<div class="row site"><span><a href="#block-\d">{row.block}</a></span>', text)
    assert "<code>layer4.0</code>: excluded" in text
    assert re.search(r'<span class="add">\+ +(\w+) = self\.se_attention\(self\.bn2\(\1\)\)</span>', text)
    assert re.search(r'<span class="del">- +(\w+) = self\.bn2\(\1\)</span>', text)
    assert "SE 64 -> 8 -> 64 after bn2 (BatchNorm2d), before +=" in plain
    assert f"{inspect_se(model).report().parameters_after:,}" in text
    assert text.count('<div class="side">') == 2 * 2


class Linked(HTMLParser):
    """Which ids there are, and which are linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href" and (value or "").startswith("#")]


def test_rows_and_the_picture_link_to_blocks_that_are_there() -> None:
    model = retrofitted("tv/resnet50")
    found = Linked(page_of(inspect_se(model)))
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links} == {"block-1", "block-2"} <= set(found.ids)
    assert len(found.links) == 2 * 16  # the table and the picture


def test_rows_are_folded_by_stage_with_their_sums() -> None:
    model = retrofitted("tv/resnet50")
    text = page_of(inspect_se(model))
    stages = re.findall(
        r'<details class="stage"( open)?><summary class="row">(.*?)</summary>(.*?)</details>', text, re.DOTALL
    )
    rows = [row for row in inspect_se(model).report().rows if row.space == (14, 14)]
    assert [opened for opened, _, _ in stages] == [""] * 4
    cells = re.findall(r"<span[^>]*>(.*?)</span>", stages[2][1])
    assert cells[0] == "14x14, 6 sites"
    assert cells[-2:] == [f"{sum(r.parameters for r in rows):,}", f"{sum(r.multiply_adds or 0 for r in rows):,}"]
    assert [part.count('class="row site"') for _, _, part in stages] == [3, 4, 6, 3]
    few = page_of(inspect_se(add_se(small_resnet())))
    assert few.count('<details class="stage" open>') == 4


def test_the_size_of_a_detectors_images_is_on_it() -> None:
    inspection = inspect_se(add_se(small_resnet()), torch.empty(2, 3, 32, 32))
    resized = replace(inspection.report(), resized="3x64x64")
    assert "one 3x32x32 input, resized to 3x64x64" in page(inspection, resized)


def test_dark_screens_are_provided_for() -> None:
    text = page_of(inspect_se(add_se(small_resnet())))
    light, dark = (set(re.findall(r"(--[\w-]+): #", part)) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL))
    assert light == dark  # each colour has its dark one
    assert "@media (prefers-color-scheme: dark)" in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used - {"--columns"} == light
    rules = re.sub(r":root \{.*?\}", "", text[: text.index("</style>")], flags=re.DOTALL)
    assert re.findall(r"#[0-9a-f]{3,6}\b", rules) == []  # no colour but by its name


def test_it_refers_to_nothing_outside(tmp_path: Path) -> None:
    assert references(inspect_se(retrofitted("tv/resnet50")).write_html(tmp_path / "a.html").read_text()) == []
    assert references(
        '<img src="https://example.org/a.png"><style>@import x.css</style>'
    )  # the check sees what it should


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    model = add_se(small_resnet())
    type(model).__name__, name = "<b>Net</b>", type(model).__name__
    try:
        text = inspect_se(model).write_html(tmp_path / "a.html").read_text()
    finally:
        type(model).__name__ = name
    assert "<b>Net" not in text
    assert "&lt;b&gt;Net&lt;/b&gt;" in text


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"does not end in \.html"):
        inspect_se(add_se(small_resnet())).write_html(tmp_path / "a.txt")
    with pytest.raises(RetrofitError, match="no folder"):
        inspect_se(add_se(small_resnet())).write_html(tmp_path / "nowhere" / "a.html")
    with pytest.raises(RetrofitError, match="has no SE"):
        inspect_se(small_resnet()).write_html(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def opened(text: str, folder: Path, width: int = 1400) -> dict[str, object]:
    """What Chromium says about a page, opened from disk."""
    assert CHROMIUM is not None
    file = folder / "probed.html"
    file.write_text(text.replace("<head>", "<head>" + PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--window-size={width},900", "--dump-dom"]
    dump, log = folder / "dump.html", folder / "log.txt"
    command = [CHROMIUM, *options, file.as_uri()]
    with dump.open("w") as out, log.open("w") as err:
        run = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        try:
            run.wait(timeout=60)
        finally:  # its processes hold on to what they were given
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    found = re.search(r'data-probe="([^"]*)"', dump.read_text())
    assert found is not None, log.read_text()
    return json.loads(html.unescape(found[1]))


@pytest.mark.sweep
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_opens_in_chromium_without_errors_and_without_a_request(tmp_path: Path) -> None:
    text = inspect_se(retrofitted("tv/resnet50")).write_html(tmp_path / "a.html").read_text()
    seen = opened(text, tmp_path)
    assert seen["fetched"] == []
    assert seen["wrong"] == []
    assert seen["drawings"] == 4
    assert seen["opened"] == [True, True]  # the first from the start, the second by the link
    assert seen["overflow"] == 0
    assert opened(text, tmp_path, width=500)["overflow"] == 0  # Chromium's windows are no narrower
    # the probe sees a request, and an error
    control = opened(
        text.replace("<main>", '<main><img src="http://127.0.0.1:9/missing.png"><script>nothing.here</script>'),
        tmp_path,
    )
    assert control["fetched"]
    assert control["wrong"]
