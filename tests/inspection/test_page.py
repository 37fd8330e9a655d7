"""The page is one file that opens anywhere, and asks nothing of anyone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inspected import retrofitted, small_resnet

from se_retrofit import RetrofitError, add_se, report
from se_retrofit.inspection import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# run in a copy of the page: what it fetched and what went wrong, where the test can read it
PROBE = """<script>
window.wrong = [];
addEventListener("error", (event) => window.wrong.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  const drawings = document.querySelectorAll("svg").length;
  document.body.dataset.probe = JSON.stringify({fetched, wrong: window.wrong, drawings});
});
</script>"""


class References(HTMLParser):
    """Whatever in a page may be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]


def references(page: str) -> list[str]:
    parser = References()
    parser.feed(page)
    styles = re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", page)
    return [r for r in parser.found if not r.startswith(("data:", "#"))] + [a or b for a, b in styles]


def test_it_holds_summary_table_differences_and_reasons(tmp_path: Path) -> None:
    model = add_se(small_resnet(), exclude="layer4.*")
    text = write_page(model, tmp_path / "a.html").read_text()
    plain = html.unescape(text)
    for row in report(model).rows:
        assert f'<td class="block">{row.block}</td>' in text
    assert "<code>layer4.0</code>: excluded" in text
    assert re.search(r'<span class="add">\+ +(\w+) = self\.se_attention\(self\.bn2\(\1\)\)</span>', text)
    assert re.search(r'<span class="del">- +(\w+) = self\.bn2\(\1\)</span>', text)
    assert "SE 64 -> 8 -> 64 after bn2 (BatchNorm2d), before +=" in plain
    assert f"{report(model).parameters_after:,}" in text
    if shutil.which("dot"):
        assert text.count("<svg") == 2


def test_it_refers_to_nothing_outside(tmp_path: Path) -> None:
    assert references(write_page(retrofitted("tv/resnet50"), tmp_path / "a.html").read_text()) == []
    assert references(
        '<img src="https://example.org/a.png"><style>@import x.css</style>'
    )  # the check sees what it should


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    model = add_se(small_resnet())
    type(model).__name__, name = "<b>Net</b>", type(model).__name__
    try:
        text = write_page(model, tmp_path / "a.html").read_text()
    finally:
        type(model).__name__ = name
    assert "<b>Net" not in text
    assert "&lt;b&gt;Net&lt;/b&gt;" in text


def test_without_graphviz_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = write_page(add_se(small_resnet()), tmp_path / "a.html").read_text()
    assert "No drawing: Graphviz was not installed" in text
    assert "self.se_attention(self.bn2(" in text


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"does not end in \.html"):
        write_page(add_se(small_resnet()), tmp_path / "a.txt")
    with pytest.raises(RetrofitError, match="no folder"):
        write_page(add_se(small_resnet()), tmp_path / "nowhere" / "a.html")
    with pytest.raises(RetrofitError, match="has no SE"):
        write_page(small_resnet(), tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def opened(text: str, folder: Path) -> dict[str, object]:
    """What Chromium says about a page, opened from disk."""
    assert CHROMIUM is not None
    page = folder / "probed.html"
    page.write_text(text.replace("<head>", "<head>" + PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    run = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', run.stdout)
    assert found is not None, run.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_it_opens_in_chromium_without_errors_and_without_a_request(tmp_path: Path) -> None:
    text = write_page(retrofitted("tv/resnet50"), tmp_path / "a.html").read_text()
    seen = opened(text, tmp_path)
    assert seen["fetched"] == []
    assert seen["wrong"] == []
    assert seen["drawings"] == (2 if shutil.which("dot") else 0)
    # the probe sees a request, and an error
    control = opened(
        text.replace("<main>", '<main><img src="http://127.0.0.1:9/missing.png"><script>nothing.here</script>'),
        tmp_path,
    )
    assert control["fetched"]
    assert control["wrong"]
