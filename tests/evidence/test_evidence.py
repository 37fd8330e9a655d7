"""docs/evidence.md and docs/peers.md show what their raw results say, and the commands behind them can be stopped and trusted."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import timm
import torch
from sweeps import swept
from torch import nn

from benchmarks import peers
from benchmarks.evidence import real
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.difference import Difference
from benchmarks.evidence.networks import NETWORKS
from benchmarks.evidence.page import Selection, write_page
from benchmarks.evidence.real import CELLS, REAL_ARMS, Cell, RealBench, Tuning, cell_runs, features, split
from benchmarks.evidence.real_page import write_real
from benchmarks.evidence.results import Results
from benchmarks.evidence.scores import SCORES
from benchmarks.evidence.signals import Signals, collect
from benchmarks.evidence.study import Bench, Missing, Setting
from benchmarks.evidence.tasks import GENERATED, Part, Task, load
from benchmarks.peers_networks import OWN
from se_retrofit import SEAttention, add_se

ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"<!-- begin ([\w-]+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)


def assert_as_committed(name: str, tables: int, tmp_path: Path, write: Callable[[Path], object]) -> None:
    """The page has so many tables, and what is written in their places is what stands there."""
    committed = (ROOT / "docs" / name).read_text()
    page = tmp_path / name
    page.write_text(TABLE.sub(r"<!-- begin \1 -->\nold\n<!-- end \1 -->", committed))
    write(page)
    assert len(TABLE.findall(committed)) == tables
    assert page.read_text() == committed


@pytest.mark.sweep
def test_the_tables_of_the_page_are_those_of_the_committed_results(tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "evidence"
    bench = Bench(folder, Setting(), only_reads=True)

    def write(page: Path) -> None:
        write_page(page, Selection(bench, [*GENERATED, "digits"], list(NETWORKS), 5, list(ARMS)), pictures=False)
        write_real(page, RealBench(Results(folder / "real.jsonl")), 5, pictures=False)

    assert_as_committed("evidence.md", 13, tmp_path, write)


def test_a_run_is_found_again_by_all_it_depends_on_and_a_cut_line_is_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).add({"arm": "SE", "seed": 0}, {"accuracy": 0.5})
    with path.open("a") as file:
        file.write('{"run": {"arm": "SE", "se')  # as a kill leaves it
    results = Results(path)
    results.add({"seed": 1, "arm": "SE"}, {"accuracy": 0.6})
    again = Results(path)
    assert again[{"arm": "SE", "seed": 1}] == {"accuracy": 0.6}
    assert {"seed": 0, "arm": "SE"} in again
    assert {"seed": 2, "arm": "SE"} not in again
    assert {"seed": 0, "arm": "plain"} not in again


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)) + 0.7
    held = [abs((d := Difference.of(row)).mean - 0.7) <= d.half for row in draws.tolist()]
    share = sum(held) / len(held)
    spread = NormalDist().inv_cdf(0.9995) * math.sqrt(0.95 * 0.05 / len(held))
    assert abs(share - 0.95) < spread
    assert str(Difference(0.5, 0.25, 5)) == "**+0.50 ± 0.25**"
    assert not Difference.of([1.0]).clear  # one seed proves nothing


@pytest.mark.parametrize("name", swept(["residual"], sorted(NETWORKS.keys() - {"residual"})))
def test_every_arm_but_that_with_the_gate_of_a_half_starts_where_its_base_stands(name: str) -> None:
    data = load("clutter", 20, 20)
    torch.manual_seed(0)
    base = NETWORKS[name](data.classes).eval()
    images = data.train.images
    for arm in ARMS.values():
        model = arm.prepare(base, images[:1], 0).eval()
        same = torch.equal(model(images), base(images))
        assert same == (arm.name != "SE, gate of 0.5"), arm.name
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (trained == sum(p.numel() for p in model.parameters())) == (arm.trains == "all")


def test_a_site_s_signals_are_the_slopes_of_the_loss_and_stay_whatever_the_batches() -> None:
    data = load("clutter", 40, 10)
    torch.manual_seed(0)
    model = add_se(NETWORKS["residual"](10).double(), example_inputs=data.train.images[:1].double())
    part = type(data.train)(data.train.images.double(), data.train.labels)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = collect(model, part, 40)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    site, se = next(((p, m) for p, m in model.named_modules() if p in seen))
    slopes, step = [], 1e-5
    for sign in (1, -1):
        gates = torch.ones(seen[site].gradients.shape[1], dtype=torch.float64)
        gates[3] += sign * step
        hook = se.fc.register_forward_hook(lambda module, args, out, gates=gates: gates.expand_as(out))  # type: ignore[union-attr,operator]
        slopes.append(torch.nn.functional.cross_entropy(model(part.images), part.labels, reduction="none").detach())
        hook.remove()
    numeric = (slopes[0] - slopes[1]) / (2 * step)
    torch.testing.assert_close(seen[site].gradients[:, 3], numeric, rtol=1e-5, atol=1e-8)

    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = collect(model, type(part)(part.images[order], part.labels[order]), 40)
    for name in ("static, |E g|²", "covariance, |Cov(g, s)|²", "nuclear norm of Cov(g, s)", "E |g|²"):
        assert SCORES[name](shuffled[site]) == pytest.approx(SCORES[name](seen[site]), rel=1e-8)


def test_the_covariance_s_score_is_zero_on_average_where_gradients_and_images_are_independent() -> None:
    torch.manual_seed(0)

    def score(dependent: bool) -> float:
        squeezed = torch.randn(30, 4, dtype=torch.float64)
        gradients = torch.randn(30, 4, dtype=torch.float64) + dependent * 0.5 * squeezed
        return SCORES["covariance, |Cov(g, s)|²"](Signals(gradients, squeezed))

    alone = torch.tensor([score(False) for _ in range(400)])
    together = torch.tensor([score(True) for _ in range(400)])
    assert abs(alone.mean()) < 4 * alone.std() / 20
    assert together.mean() > 20 * alone.std() / 20


@pytest.mark.sweep
def test_the_command_runs_goes_on_where_it_was_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    small = "--train 64 --test 40 --base-epochs 1 --epochs 1 --seeds 1 --jobs 1 --tasks texture --networks residual"
    arguments = [*small.split(), "--folder", str(tmp_path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["evidence", *arguments])
    threads = torch.get_num_threads()
    try:
        assert main() == 0
    finally:
        torch.set_num_threads(threads)
    written, rows = page.read_text(), results.read_text().splitlines()
    assert "No results yet" not in written
    assert {p.name for p in tmp_path.iterdir()} >= {"page-differences.svg", "page-tasks.png", "bases"}

    results.write_text("\n".join(rows[:-1]) + "\n")  # as if it had been stopped before the last run
    subprocess.run([sys.executable, "-m", "benchmarks.evidence", *arguments], cwd=ROOT, check=True, capture_output=True)

    def facts(line: str) -> dict[str, object]:
        row = json.loads(line)
        del row["outcome"]["cpu_seconds"]
        return row  # type: ignore[no-any-return]

    again = results.read_text().splitlines()
    assert again[:-1] == rows[:-1]
    assert facts(again[-1]) == facts(rows[-1])


# Pictures of real things

SIZE = 32


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small network, and noise with two classes, in the place of what the packages hold."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Part:
        labels = torch.arange(count) % 2
        return Part(torch.randn(count, 3, SIZE, SIZE, generator=generator) + labels[:, None, None, None], labels)

    data = Task(part(32), part(8), part(8), classes=2)
    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    monkeypatch.setattr(real, "real_task", lambda name, packages, seed: data)
    monkeypatch.setattr(real, "pretrained", lambda packages: network)
    features.cache_clear()
    return Path("none")


def test_things_are_in_one_part_alone_and_those_to_test_on_are_the_same_for_all_seeds() -> None:
    number = torch.arange(2 * 10 * 2).reshape(2, 10, 2, 1, 1, 1).expand(-1, -1, -1, 3, 1, 1).byte()
    tasks = [split(list(number), seed, train=4, val=2, test=3) for seed in (0, 1)]
    for task in tasks:
        parts = [((p.images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long() for p in (task.train, task.val, task.test)]
        assert sorted(torch.cat(parts).unique().tolist()) == sorted(torch.cat(parts).tolist())
        assert [len(p) for p in parts] == [16, 8, 12]  # both pictures of each thing, for two kinds
        for shown, part in zip(parts, (task.train, task.val, task.test), strict=True):
            assert (shown // 20 == part.labels).all()
            assert (shown[::2] + 1 == shown[1::2]).all()
    assert torch.equal(tasks[0].test.images, tasks[1].test.images)
    assert not torch.equal(tasks[0].train.images, tasks[1].train.images)


@pytest.mark.parametrize(("best", "tried"), [(1e-3, 4), (3e-3, 3), (3e-2, 4), (3e-4, 4)])
def test_a_search_goes_on_until_the_best_rate_has_both_its_neighbours(
    best: float, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(tuning: Tuning, packages: Path) -> dict[str, float]:
        return {"accuracy": 1 - abs(torch.tensor(tuning.lr / best).log10().item()), "loss": 0.0}

    monkeypatch.setattr(real, "tune", tune)
    bench = RealBench(Results(tmp_path / "real.jsonl"), tmp_path)
    assert bench.search(Cell("emoji", ("norms",), 1), "norms") == best
    assert len(bench.results.done) == tried


def test_a_cell_s_runs_are_found_again_and_shown(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("noise", ("head", "norms, statistics kept", "static", "SE, r = 8"), 1)
    file, page = tmp_path / "real.jsonl", tmp_path / "page.md"
    done: list[Any] = []
    tune: Callable[..., Any] = real.tune
    monkeypatch.setattr(real, "tune", lambda *given: (done.append(given), tune(*given))[1])
    monkeypatch.setattr(real, "RATES", (3e-4, 1e-3, 3e-3))
    for _ in cell_runs(RealBench(Results(file), small), cell, 2):
        pass
    assert len(done) == len(file.read_text().splitlines())
    bench = RealBench(Results(file))
    for _ in cell_runs(bench, cell, 2):
        pass
    with pytest.raises(Missing, match="has not been carried out"):
        bench.run(cell.tuning("head", 1e-3, 3))
    monkeypatch.setitem(CELLS, "noise, frozen", cell)
    write_real(page, bench, 2)
    (row,) = (line for line in page.read_text().splitlines() if line.startswith("| noise, frozen"))
    assert row.count("±") == 3
    assert (tmp_path / "page-real.svg").exists()


def test_training_the_head_on_kept_features_is_training_it_in_the_network(small: Path) -> None:
    tuning = Tuning("noise", "head", 1e-3, 0, 2)
    quick = real.tune(tuning, small)
    arm, data = REAL_ARMS["head"], real.real_task("noise", small, 0)
    torch.manual_seed(0)
    network = real.pretrained(small)
    base = timm.create_model("test_resnet")
    base.load_state_dict(network.state_dict())
    torch.manual_seed(0)
    base.reset_classifier(2)
    model = arm.prepare(base, data.train.images[:1], 0)
    real.train(model, data.train, epochs=2, lr=1e-3, seed=1, set_modes=arm.set_modes, recipe=tuning.recipe)
    accuracy, loss = real.measured(model, data.test)
    assert quick["accuracy"] == accuracy
    assert quick["loss"] == pytest.approx(loss, rel=1e-4)
    assert real.saturated(model, data.test) is None


# Peers


def test_the_tables_of_peers_are_those_of_the_committed_results(tmp_path: Path) -> None:
    results = Results(ROOT / "benchmarks" / "peers.jsonl")
    assert_as_committed("peers.md", 3, tmp_path, lambda page: peers.write_page(page, results))
    networks = {(row["run"]["kind"], row["run"]["network"]) for row in results.done.values() if "kind" in row["run"]}
    assert sum(kind == "zoo" for kind, _ in networks) >= 60
    assert {name for kind, name in networks if kind == "own"} == set(OWN)


def halved(model: nn.Module, inputs: object, blocks: object) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.fc.weight /= 2  # type: ignore[union-attr,operator]
    model.se = SEAttention(8)
    return model


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ("`add_se`", {"converted", "outputs", "keys", "classes", "pickle"}),
        ("`nn.Sequential(block, SE)`", {"converted", "outputs", "pickle"}),
        ("`symbolic_trace`, node inserted", {"converted", "outputs", "keys", "pickle"}),
        ("nothing", set()),
        ("halved", {"converted", "classes", "pickle"}),
    ],
)
def test_what_a_way_loses_is_seen(way: str, kept: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "COMPILED", 0)
    monkeypatch.setitem(peers.WAYS, "nothing", lambda model, inputs, blocks: model)
    monkeypatch.setitem(peers.WAYS, "halved", halved)
    found = peers.outcome(OWN["Residual"], way)
    assert {promise for promise, holds in found.items() if holds} == kept
