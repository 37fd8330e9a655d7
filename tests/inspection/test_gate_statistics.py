"""What is told of the gates is what the gates were, and gathering it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from inspected import small_resnet
from torch import Tensor, nn

from se_retrofit import RetrofitError, SEAttention, add_se, fuse_se, plan_of
from se_retrofit.attention import Inserted, StaticFactor
from se_retrofit.inspection import GateLogger, excitations, plot_gates
from se_retrofit.inspection.gates import Moments


def batches(number: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(size, 3, 32, 32, generator=generator) for _ in range(number)]
    return [(x * torch.arange(1, size + 1).view(-1, 1, 1, 1), torch.arange(size) % 3) for x in draws]


def network(**options: Any) -> nn.Module:
    """Retrofitted, with gates that are no longer 1."""
    torch.manual_seed(0)
    model = add_se(small_resnet(), **options)
    for module in model.modules():
        if isinstance(module, Inserted):
            for parameter in module.parameters():
                nn.init.normal_(parameter, mean=float(isinstance(module, StaticFactor)), std=0.5)
    return model.eval()


def all_gates(model: nn.Module, path: str) -> Tensor:
    """All gates of a site, gathered in the plainest way."""
    se, seen = model.get_submodule(path), []
    hook = se.register_forward_pre_hook(lambda module, args: seen.append(module.gates(args[0])))
    with torch.no_grad():
        for x, _ in batches():
            model(x)
    hook.remove()
    return torch.cat(seen).double()


def hooks_of(model: nn.Module) -> list[object]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


# Over a data set ------------------------------------------------------------------------------------------------------


def test_before_fine_tuning_all_gates_are_exactly_1() -> None:
    model = add_se(small_resnet())
    found = excitations(model, batches())
    assert [site.path for site in found.sites] == [site.path for site in plan_of(model).sites]
    assert all((site.mean == 1).all() and (site.std == 0).all() for site in found.sites)
    assert all(site.low == site.high == 1.0 for site in found.sites)
    assert set(found.notes) == {site.path for site in found.sites}
    assert "note: all sites: all gates are exactly 1" in str(found)


def test_statistics_are_those_of_all_gates_together() -> None:
    model = network()
    found = excitations(model, batches())
    assert found.inputs == 18
    labels = torch.cat([y for _, y in batches()])
    for site in found.sites:
        gates = all_gates(model, site.path)
        torch.testing.assert_close(site.mean, gates.mean(0))
        torch.testing.assert_close(site.std, gates.std(0, correction=0))
        assert site.between == pytest.approx(float(gates.var(0, correction=0).mean() / gates.var(correction=0)))
        assert site.saturated == pytest.approx(float(((gates < 0.05) | (gates > 1.95)).double().mean()))
        assert (site.low, site.high, site.count) == (gates.min().item(), gates.max().item(), 18)
        assert sorted(site.class_means) == [0, 1, 2]
        for label, mean in site.class_means.items():
            torch.testing.assert_close(mean, gates[labels == label].mean(0))
        assert site.class_spread == pytest.approx(
            float(torch.stack([gates[labels == n].mean(0) for n in range(3)]).std(0, correction=0).mean())
        )
    data = json.loads(json.dumps(found.to_dict()))
    assert data["sites"][0]["mean"] == found.sites[0].mean.tolist()
    assert list(data["sites"][0]["class_means"]) == ["0", "1", "2"]


def test_the_model_is_not_changed_also_if_a_run_fails() -> None:
    model = network().train()
    model.layer2.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    excitations(model, batches())
    with pytest.raises(RuntimeError):
        excitations(model, [torch.randn(2, 5, 32, 32)])
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks_of(model) == []
    torch.set_rng_state(state)  # the draw above
    excitations(model, batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_gates_that_hardly_vary_and_sites_that_are_never_called_are_noted() -> None:
    model = network()
    nn.init.normal_(model.layer1[0].se_attention.fc[2].weight, std=1e-4)
    model.spare = add_se(small_resnet()).layer4
    found = excitations(model, batches())
    assert found.missed == ("spare.0.se_attention",)
    assert list(found.notes) == ["layer1.0.se_attention", "spare.0.se_attention"]
    assert "close to 1" in found.notes["layer1.0.se_attention"]


def test_batches_may_be_tensors_alone() -> None:
    found = excitations(network(), (x for x, _ in batches()))
    assert found.inputs == 18
    assert all(not site.class_means and site.class_spread is None for site in found.sites)
    assert excitations(network(), batches(), max_batches=1).inputs == 6


def test_plot_has_a_row_a_stage(tmp_path: Path) -> None:
    found = excitations(network(), batches())
    assert [len(stage) for stage in found.stages] == [1, 2, 1, 1]
    figure = found.plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes[2:4]
    assert [label.get_text() for label in left.get_xticklabels()] == ["layer2.0", "layer2.1"]
    assert right.get_title().startswith("layer2.1")
    drawn = {line.get_label(): line for line in right.get_lines()}
    assert {"class 0", "class 1", "class 2", "all"} <= drawn.keys()
    assert drawn["all"].get_ydata().tolist() == found.stages[1][1].mean.sort().values.tolist()
    for name in ("gates.doc", "nowhere/gates.png"):
        with pytest.raises(RetrofitError):
            found.plot(tmp_path / name)
    low, high = excitations(add_se(small_resnet()), batches(1)).plot().axes[0].get_ylim()
    assert low < 0.96 < 1.04 < high  # no rounding errors are shown where all gates are 1


def test_mistakes_in_data_and_models() -> None:
    with pytest.raises(RetrofitError, match="no batch"):
        excitations(add_se(small_resnet()), [])
    with pytest.raises(TypeError, match="got dict"):
        excitations(add_se(small_resnet()), [{"image": torch.randn(1, 3, 32, 32)}])
    for look in (lambda model: excitations(model, batches()), GateLogger):
        with pytest.raises(RetrofitError, match="has no SE"):
            look(small_resnet())
        with pytest.raises(TypeError, match=r"nn\.Module"):
            look("resnet18")  # type: ignore[arg-type]


# While it trains ------------------------------------------------------------------------------------------------------


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
        assert hooks_of(model) == []
        return dict(model.state_dict())

    plain, logged = trained(False), trained(True)
    assert all(torch.equal(logged[key], value) for key, value in plain.items())


def test_every_listens_to_some_calls_only_and_reset_begins_anew() -> None:
    model, (one, two, three) = network(), [x for x, _ in batches()]
    site = plan_of(model).sites[0].path

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
    for every, error in ((0, RetrofitError), (True, TypeError)):
        with pytest.raises(error, match="every"):
            GateLogger(model, every=every)
    assert hooks_of(model) == []


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
def test_compiled_code_is_compiled_once_for_a_logger() -> None:
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


def epochs() -> Iterator[tuple[GateLogger, dict[str, Any]]]:
    """A logger, and what it tells, after each of three epochs."""
    model = network()
    with GateLogger(model) as gates, torch.no_grad():
        for x, _ in batches():
            model(x)
            yield gates, gates.summary()
            gates.reset()


def test_it_writes_what_tensorboard_takes_and_numbers_fit_for_json() -> None:
    writer = Mock()  # in the place of TensorBoard's SummaryWriter
    gates, summary = next(epochs())
    gates.write(writer, 7)
    assert [call.args[0] for call in writer.add_scalar.call_args_list] == [
        f"gates_variation/{path}" for path in summary
    ]
    for call, (path, seen) in zip(writer.add_histogram.call_args_list, summary.items(), strict=True):
        tag, values, step = call.args
        assert (tag, step) == (f"gates/{path}", 7)
        assert torch.equal(values, seen.mean)
        row = json.loads(json.dumps(seen.quartiles()))
        assert row["channels"] == sorted(row["channels"])
        assert row["channels"][2] == pytest.approx(float(seen.mean.quantile(0.5)))


def test_the_picture_has_a_panel_for_each_site_and_shows_the_epochs_medians(tmp_path: Path) -> None:
    seen = {epoch: summary for epoch, (_, summary) in enumerate(epochs())}
    figure = plot_gates(seen, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().split()[0] for axes in panels] == [p.removesuffix(".se_attention") for p in seen[0]]
    for axes, path in zip(panels, seen[0], strict=True):
        line = next(line for line in axes.lines if line.get_label() == "median")
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == pytest.approx([float(seen[e][path].mean.quantile(0.5)) for e in range(3)])
    with pytest.raises(RetrofitError, match="no gates to draw"):
        plot_gates({0: {}})
