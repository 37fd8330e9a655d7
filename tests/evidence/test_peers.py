"""docs/peers.md shows what was found, and what is looked at in it can be lost."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.evidence.results import Results
from benchmarks.peers_networks import OWN
from se_retrofit import SEAttention

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"<!-- begin ([\w-]+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)


def test_the_tables_of_the_page_are_those_of_the_committed_results(tmp_path: Path) -> None:
    committed = (ROOT / "docs" / "peers.md").read_text()
    page = tmp_path / "peers.md"
    page.write_text(TABLE.sub(r"<!-- begin \1 -->\nold\n<!-- end \1 -->", committed))
    results = Results(ROOT / "benchmarks" / "peers.jsonl")
    peers.write_page(page, results)
    assert page.read_text() == committed
    assert len(TABLE.findall(committed)) == 3
    networks = {(row["run"]["kind"], row["run"]["network"]) for row in results.done.values() if "kind" in row["run"]}
    assert sum(kind == "zoo" for kind, _ in networks) >= 60
    assert {name for kind, name in networks if kind == "own"} == set(OWN)


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ("`add_se`", {"converted", "outputs", "keys", "classes", "pickle"}),
        ("`nn.Sequential(block, SE)`", {"converted", "outputs", "pickle"}),
        ("`symbolic_trace`, node inserted", {"converted", "outputs", "keys", "pickle"}),
    ],
)
def test_what_a_way_loses_is_seen(way: str, kept: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "COMPILED", 0)
    found = peers.outcome(OWN["Residual"], way)
    assert {promise for promise, holds in found.items() if holds} == kept


def test_outputs_that_differ_and_networks_without_se_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "COMPILED", 0)
    monkeypatch.setitem(peers.WAYS, "nothing", lambda model, inputs, blocks: model)
    assert peers.outcome(OWN["Residual"], "nothing")["converted"] is False

    def halved(model: nn.Module, inputs: object, blocks: object) -> nn.Module:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.head.fc.weight /= 2  # type: ignore[union-attr,operator]
        model.se = SEAttention(8)
        return model

    monkeypatch.setitem(peers.WAYS, "halved", halved)
    found = peers.outcome(OWN["Residual"], "halved")
    assert (found["converted"], found["outputs"], found["keys"]) == (True, False, False)


def test_se_lands_where_the_native_network_has_it() -> None:
    assert peers.landed("resnet18", "seresnet18", "`add_se`") == {"native": 8, "own": 8, "both": 8}
    assert peers.landed("resnet18", "seresnet18", "`nn.Sequential(block, SE)`") == {"native": 8, "own": 8, "both": 0}
