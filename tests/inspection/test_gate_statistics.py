"""What is told of the gates is what the gates were, and gathering it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from inspected import Twice, small_resnet
from networks import assert_untouched, random_states, randomise_se, snapshot
from torch import Tensor, nn

from se_retrofit import (
    RetrofitError,
    SEAttention,
    add_se,
    fold_se,
    fuse_se,
    load_retrofitted,
    plan_of,
    remove_se,
    save_retrofitted,
)
from se_retrofit.attention import Inserted
from se_retrofit.inspection import Excitations, GateLogger, excitations, plot_gates

SIZES = (11, 1, 6)
IMAGES = (
    torch.randn(18, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 19).view(-1, 1, 1, 1) / 3
)
LABELS = torch.arange(18) % 3
BATCHES = list(zip(IMAGES.split(SIZES), LABELS.split(SIZES), strict=True))


def network(**options: Any) -> nn.Module:
    """Retrofitted, with gates that are no longer 1."""
    return randomise_se(add_se(small_resnet(), **options), std=0.5).eval()


@pytest.fixture(scope="module")
def found() -> Excitations:
    return excitations(network(), BATCHES)


def hooks_of(model: nn.Module) -> list[object]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


# Over a data set ------------------------------------------------------------------------------------------------------


def test_before_fine_tuning_all_gates_are_exactly_1() -> None:
    model = add_se(small_resnet())
    found = excitations(model, (x for x, _ in BATCHES[:2]))
    assert [site.path for site in found.sites] == [site.path for site in plan_of(model).sites]
    for site in found.sites:
        assert (site.mean == 1).all()
        assert (site.std == 0).all()
        assert site.low == site.high == 1.0
        assert (site.class_means, site.class_spread) == ({}, None)  # batches may be tensors alone
    assert set(found.notes) == {site.path for site in found.sites}
    assert "note: all sites: all gates are exactly 1" in str(found)
    low, high = found.plot().axes[0].get_ylim()
    assert low < 0.96 < 1.04 < high  # no rounding errors are shown


def test_statistics_are_those_of_all_gates_together(found: Excitations) -> None:
    model, seen = network(), dict[str, list[Tensor]]()
    for site in found.sites:  # gathered in the plainest way
        se = model.get_submodule(site.path)
        se.register_forward_pre_hook(lambda m, args, path=site.path: seen.setdefault(path, []).append(m.gates(args[0])))
    with torch.no_grad():
        for x, _ in BATCHES:
            model(x)
    for site in found.sites:
        gates = torch.cat(seen[site.path]).double()
        torch.testing.assert_close(site.mean, gates.mean(0))
        torch.testing.assert_close(site.std, gates.std(0, correction=0))
        assert site.between == pytest.approx(float(gates.var(0, correction=0).mean() / gates.var(correction=0)))
        assert site.saturated == pytest.approx(float(((gates < 0.05) | (gates > 1.95)).double().mean()))
        assert (site.low, site.high, site.count) == (gates.min().item(), gates.max().item(), 18)
        means = torch.stack([gates[n == LABELS].mean(0) for n in range(3)])
        torch.testing.assert_close(torch.stack([site.class_means[n] for n in range(3)]), means)
        assert site.class_spread == pytest.approx(float(means.std(0, correction=0).mean()))
    assert any(site.saturated for site in found.sites)
    assert found.inputs == 18
    assert excitations(model, BATCHES, max_batches=1).inputs == SIZES[0]


def test_the_model_is_not_changed_also_if_a_run_fails() -> None:
    model = network().train()
    model.layer2.eval()
    before, states = snapshot(model), list(random_states())
    excitations(model, BATCHES[:1])
    with pytest.raises(RuntimeError):
        excitations(model, [torch.zeros(2, 5, 32, 32)])
    assert_untouched(model, before)
    assert hooks_of(model) == []
    assert list(random_states()) == states


def test_gates_that_hardly_vary_and_sites_that_are_never_called_are_noted() -> None:
    model = network()
    nn.init.normal_(model.layer1[0].se_attention.fc[2].weight, std=1e-4)
    model.spare = add_se(Twice(), example_inputs=torch.empty(1, 3, 8, 8)).block
    found = excitations(model, BATCHES)
    assert found.missed == ("spare.se_attention",)
    assert list(found.notes) == ["layer1.0.se_attention", "spare.se_attention"]
    assert "close to 1" in found.notes["layer1.0.se_attention"]


class Loader(list[Any]):
    """A loader of a data set whose classes have names."""

    dataset = SimpleNamespace(classes=["_cat", "$d_{$og", "漢"])


def test_plot_has_a_row_a_stage_and_lines_with_the_names_of_classes(found: Excitations, tmp_path: Path) -> None:
    assert [len(stage) for stage in found.stages] == [1, 2, 1, 1]
    figure = found.plot()
    left, right = figure.axes[2:4]
    assert [label.get_text() for label in left.get_xticklabels()] == ["layer2.0", "layer2.1"]
    assert right.get_title().startswith("layer2.1")
    drawn = {line.get_label(): line for line in right.get_lines()}
    assert {"class 0", "class 1", "class 2", "all"} <= drawn.keys()
    assert drawn["all"].get_ydata().tolist() == found.stages[1][1].mean.sort().values.tolist()
    named = excitations(network(), Loader(BATCHES[:1])).plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")  # whatever the names are
    legend = named.axes[1].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 5
    for name in ("gates.doc", "nowhere/gates.png"):
        with pytest.raises(RetrofitError):
            found.plot(tmp_path / name)


def test_a_list_of_images_with_their_classes_is_a_data_set(found: Excitations) -> None:
    pairs = [(image, int(label)) for images, labels in BATCHES for image, label in zip(images, labels, strict=True)]
    for site, expected in zip(excitations(network(), pairs).sites, found.sites, strict=True):
        torch.testing.assert_close(site.mean, expected.mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: excitations(network(), []), RetrofitError, "no batch"),
        (lambda: excitations(network(), {"image": BATCHES[0][0]}), TypeError, "got str"),
        (lambda: excitations(network(), BATCHES, max_batches=0), RetrofitError, "max_batches"),
        (lambda: excitations(small_resnet(), BATCHES), RetrofitError, "no SE"),
        (lambda: excitations("resnet18", BATCHES), TypeError, r"nn\.Module"),  # type: ignore[arg-type]
        (lambda: GateLogger(small_resnet()), RetrofitError, "no SE"),
        (lambda: GateLogger("resnet18"), TypeError, r"nn\.Module"),  # type: ignore[arg-type]
        (lambda: plot_gates({0: {}}), RetrofitError, "no gates"),
    ],
)
def test_mistakes_in_data_and_models(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


# While it trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "static", "fused"])
def test_a_logger_and_excitations_tell_the_same_of_the_same_data(form: str) -> None:
    model = network(attention="static") if form == "static" else network()
    if form == "fused":
        model = fuse_se(model).eval()
    with GateLogger(model) as gates, torch.no_grad():
        model(BATCHES[0][0])
        gates.reset()
        model(IMAGES[:0])
        assert gates.summary() == {}
        for x, _ in BATCHES:
            model(x)
    seen = gates.summary()
    told = excitations(model, BATCHES)
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
        for x, y in BATCHES[::2]:
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


@pytest.mark.sweep
def test_compiled_code_is_compiled_once_for_a_logger(found: Excitations) -> None:
    compiled: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model = network()
    site = next(path for path, m in model.named_modules() if isinstance(m, SEAttention))
    torch._dynamo.reset()
    with GateLogger(model) as gates, torch.no_grad():
        fast = torch.compile(model, backend=count, fullgraph=True)
        for x in IMAGES.split(6):
            fast(x)
    assert len(compiled) == 1
    assert gates.summary()[site].count == 18
    torch.testing.assert_close(gates.summary()[site].mean.double(), found.sites[0].mean, rtol=1e-5, atol=1e-6)


def test_the_epochs_are_written_for_tensorboard_and_json_and_drawn_with_a_panel_a_site(tmp_path: Path) -> None:
    model, writer, epochs = network(), Mock(), []  # in the place of TensorBoard's SummaryWriter
    with GateLogger(model) as gates, torch.no_grad():
        for epoch, (x, _) in enumerate(BATCHES):
            model(x)
            gates.write(writer, epoch)
            epochs.append(gates.summary())
            gates.reset()
    paths = list(epochs[0])
    assert [call.args[0] for call in writer.add_scalar.call_args_list] == [f"gates_variation/{p}" for p in paths] * 3
    for call, path in zip(writer.add_histogram.call_args_list, paths, strict=False):
        tag, values, step = call.args
        assert (tag, step) == (f"gates/{path}", 0)
        assert torch.equal(values, epochs[0][path].mean)
    row = json.loads(json.dumps(epochs[0][paths[0]].quartiles()))
    assert row["channels"] == sorted(row["channels"])
    figure = plot_gates(dict(enumerate(epochs)), tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().split()[0] for axes in panels] == [path.removesuffix(".se_attention") for path in paths]
    for axes, path in zip(panels, paths, strict=True):
        line = next(line for line in axes.lines if line.get_label() == "median")
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == pytest.approx([float(e[path].mean.quantile(0.5)) for e in epochs])


@torch.no_grad()
def prune(layer: nn.Module, dim: int, keep: int, name: str) -> None:
    """Keep some of a layer's outputs (dim 0) or inputs (dim 1), as libraries for structured pruning do."""
    for key, parameter in list(layer.named_parameters()):
        if parameter.dim() > dim:
            setattr(layer, key, nn.Parameter(parameter.narrow(dim, 0, keep).clone()))
    setattr(layer, name, keep)


@pytest.mark.filterwarnings("ignore:.*does not tell the name:UserWarning")
@pytest.mark.parametrize("attention", ["se", "static"])
def test_of_channels_that_are_pruned_after_the_retrofit_those_left_are_told(attention: str, tmp_path: Path) -> None:
    bare = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model = randomise_se(add_se(bare, 2, attention=attention)).eval()
    prune(model[0], 0, 4, "out_channels")
    prune(model[2], 1, 4, "in_channels")
    se = next(module for module in model[1].modules() if isinstance(module, Inserted))
    if attention == "se":
        prune(se.fc[0], 1, 4, "in_features")
        prune(se.fc[2], 0, 4, "out_features")
    else:
        prune(se, 0, 4, "pruned_to")
    x = torch.randn(2, 3, 9, 9)
    found = excitations(model, [x])
    assert [len(site.mean) for site in found.sites] == [site.channels for site in plan_of(model).sites] == [4, 8]
    assert fold_se(model, [x])(x).shape == model(x).shape
    folder = save_retrofitted(model, tmp_path / "pruned")
    assert torch.equal(load_retrofitted(folder, base=remove_se(model)).eval()(x), model(x))
