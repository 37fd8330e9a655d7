"""What a logger of gates gathers in somebody's own loop is what the gates were, and gathering changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inspected import small_resnet
from torch import Tensor, nn

from se_retrofit import RetrofitError, SEAttention, add_se, fuse_se
from se_retrofit.attention import Inserted, StaticFactor
from se_retrofit.inspection import GateLogger, excitations, plot_gates
from se_retrofit.inspection.moments import Moments


def batches(number: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.arange(1, size + 1).view(-1, 1, 1, 1)
    return [(torch.randn(size, 3, 32, 32, generator=generator) * scales, torch.arange(size)) for _ in range(number)]


def network(**options: Any) -> nn.Module:
    """Retrofitted, with gates that are no longer 1."""
    torch.manual_seed(0)
    model = add_se(small_resnet(), **options)
    for module in model.modules():
        if isinstance(module, Inserted):
            for parameter in module.parameters():
                nn.init.normal_(parameter, mean=float(isinstance(module, StaticFactor)), std=0.5)
    return model.eval()


@pytest.mark.parametrize("form", ["", "static", "fused"])
def test_a_logger_and_excitations_tell_the_same_of_the_same_data(form: str) -> None:
    model = network(attention="static") if form == "static" else network()
    if form == "fused":
        model = fuse_se(model).eval()
    with GateLogger(model) as gates, torch.no_grad():
        for x, _ in batches():
            model(x)
    seen = gates.summary()
    told = excitations(model, batches())
    assert list(seen) == [site.path for site in told.sites]
    for site in told.sites:
        own = seen[site.path]
        assert own.count == site.count == 18
        torch.testing.assert_close(own.mean.double(), site.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.std.double(), site.std, rtol=1e-4, atol=1e-5)
        assert (own.low, own.high) == (pytest.approx(site.low, rel=1e-5), pytest.approx(site.high, rel=1e-5))
        assert own.high > own.low
        assert (own.variation < 1e-6) == (form == "static")


def test_training_with_a_logger_gives_the_same_bits_and_a_closed_one_leaves_nothing_behind() -> None:
    def trained(logged: bool) -> dict[str, Tensor]:
        model = network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        gates = GateLogger(model) if logged else None
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if gates is not None:
            assert all(s.mean.grad_fn is None for s in gates.summary().values())
            gates.close()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return dict(model.state_dict())

    plain, logged = trained(False), trained(True)
    assert all(torch.equal(logged[key], value) for key, value in plain.items())


def test_every_listens_to_some_calls_only_and_reset_begins_anew() -> None:
    model, (one, two, three) = network(), [x for x, _ in batches()]
    site = next(path for path, m in model.named_modules() if isinstance(m, SEAttention))

    def seen(*inputs: Tensor, every: int = 1) -> Tensor:
        with GateLogger(model, every=every) as gates, torch.no_grad():
            for x in inputs:
                model(x)
        return gates.summary()[site].mean

    assert torch.equal(seen(one, two, three, every=2), seen(one, three))
    with GateLogger(model) as gates, torch.no_grad():
        model(one)
        gates.reset()
        assert gates.summary() == {}
        model(two)
        assert torch.equal(gates.summary()[site].mean, seen(two))


def test_batches_of_any_size_and_far_from_zero_have_exact_moments() -> None:
    values = 1000 + torch.randn(97, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments(5, torch.float64, limits=(999.0, 1002.0))
    for part in (values[:1], values[1:1], values[1:60], values[60:]):
        moments.add(part)
    assert int(moments.rows) == 97
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.std, values.std(0, correction=0), rtol=1e-10, atol=0)
    assert (moments.low, moments.high) == (values.min(), values.max())
    beyond = ((values < 999) | (values > 1002)).double().mean()
    assert 0.1 < beyond < 0.9
    torch.testing.assert_close(moments.beyond, beyond, rtol=1e-12, atol=0)


@pytest.mark.sweep
def test_compiled_code_is_compiled_once_for_a_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model = network()
    site = next(path for path, m in model.named_modules() if isinstance(m, SEAttention))
    torch._dynamo.reset()
    with GateLogger(model) as gates, torch.no_grad():
        fast = torch.compile(model, backend=count, fullgraph=True)
        for x, _ in batches():
            fast(x)
    assert len(compiled) == 1
    assert gates.summary()[site].count == 18
    told = excitations(network(), batches()).sites[0]
    torch.testing.assert_close(gates.summary()[site].mean.double(), told.mean, rtol=1e-5, atol=1e-6)


def test_it_writes_what_tensorboard_takes_and_numbers_fit_for_json() -> None:
    class Writer:
        def __init__(self) -> None:
            self.histograms: dict[str, tuple[Tensor, int]] = {}
            self.scalars: dict[str, tuple[float, int]] = {}

        def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
            self.histograms[tag] = values, step

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars[tag] = value, step

    model, writer = network(), Writer()
    with GateLogger(model) as gates, torch.no_grad():
        model(batches()[0][0])
        gates.write(writer, 7)
    summary = gates.summary()
    assert set(writer.histograms) == {f"gates/{path}" for path in summary}
    assert set(writer.scalars) == {f"gates_variation/{path}" for path in summary}
    for path, seen in summary.items():
        values, step = writer.histograms[f"gates/{path}"]
        assert torch.equal(values, seen.mean)
        assert step == 7
        row = json.loads(json.dumps(seen.to_dict()))
        assert row["channels"] == sorted(row["channels"])
        assert row["channels"][2] == pytest.approx(float(seen.mean.quantile(0.5)))


def test_the_picture_has_a_panel_for_each_site_and_shows_the_epochs_medians(tmp_path: Path) -> None:
    model, epochs = network(), {}
    with GateLogger(model) as gates, torch.no_grad():
        for epoch, (x, _) in enumerate(batches()):
            model(x)
            epochs[epoch] = gates.summary()
            gates.reset()
    figure = plot_gates(epochs, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().split()[0] for axes in panels] == [p.removesuffix(".se_attention") for p in epochs[0]]
    for axes, path in zip(panels, epochs[0], strict=True):
        line = next(line for line in axes.lines if line.get_label() == "median")
        assert list(line.get_xdata()) == [0, 1, 2]
        medians = [float(epochs[e][path].mean.quantile(0.5)) for e in range(3)]
        assert list(line.get_ydata()) == pytest.approx(medians)
    with pytest.raises(RetrofitError, match="no gates to draw"):
        plot_gates({0: {}})


def test_wrong_input_is_refused_and_nothing_is_left_on_the_model() -> None:
    model = network()
    with pytest.raises(RetrofitError, match="at least 1, got 0"):
        GateLogger(model, every=0)
    with pytest.raises(TypeError, match="positive int"):
        GateLogger(model, every=True)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        GateLogger("resnet50")  # type: ignore[arg-type]
    with pytest.raises(RetrofitError):
        GateLogger(small_resnet())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
