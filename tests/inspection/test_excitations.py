"""The gates' statistics are those of the gates, and gathering them changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inspected import small_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from se_retrofit import RetrofitError, SEAttention, add_se, plan_of
from se_retrofit.cli.demo_network import SmallResNet
from se_retrofit.finetune import FinetuneConfig, finetune, load_data
from se_retrofit.inspection import Excitations, excitations


def batches(number: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(size, 3, 32, 32, generator=generator) for _ in range(number)]
    return [(x * torch.arange(1, size + 1).view(-1, 1, 1, 1), torch.arange(size) % 3) for x in draws]


def trained() -> nn.Module:
    """A retrofitted model whose gates are no longer 1."""
    model = add_se(small_resnet())
    for module in model.modules():
        if isinstance(module, SEAttention):
            nn.init.normal_(module.fc[2].weight, std=0.5)
    return model


def gates_of(model: nn.Module, path: str) -> Tensor:
    """All gates of a site, gathered in the plainest way."""
    se, seen = model.get_submodule(path), []
    hook = se.register_forward_pre_hook(lambda module, args: seen.append(module.gates(args[0])))
    model.eval()
    with torch.no_grad():
        for x, _ in batches():
            model(x)
    hook.remove()
    return torch.cat(seen).double()


def test_before_fine_tuning_all_gates_are_exactly_1() -> None:
    model = add_se(small_resnet())
    found = excitations(model, batches())
    assert [site.path for site in found.sites] == [site.path for site in plan_of(model).sites]
    assert all((site.mean == 1).all() and (site.std == 0).all() for site in found.sites)
    assert all(site.low == site.high == 1.0 for site in found.sites)
    assert all("not fine-tuned yet" in note for note in found.notes.values())
    assert "note: all sites: all gates are exactly 1" in str(found)


def test_statistics_are_those_of_all_gates_together() -> None:
    model = trained()
    found = excitations(model, batches())
    assert found.inputs == 18
    labels = torch.cat([y for _, y in batches()])
    for site in found.sites:
        gates = gates_of(model, site.path)
        torch.testing.assert_close(site.mean, gates.mean(0))
        torch.testing.assert_close(site.std, gates.std(0, correction=0))
        assert (site.low, site.high) == (gates.min().item(), gates.max().item())
        assert sorted(site.class_means) == [0, 1, 2]
        for label, mean in site.class_means.items():
            torch.testing.assert_close(mean, gates[labels == label].mean(0))
        assert site.class_spread is not None
        assert 0 < site.class_spread < 1
        assert site.count == 18


def test_on_the_demos_network() -> None:
    digits = load_data("digits", image_size=8).val
    model = add_se(SmallResNet())
    loader = DataLoader(digits, batch_size=100)
    before = excitations(model, loader)
    assert before.inputs == len(digits)
    assert all(site.low == site.high == 1.0 for site in before.sites)
    finetune(model, digits, config=FinetuneConfig(epochs=1, lr=5e-3, cpu=True), quiet=True)
    after = excitations(model, loader)
    assert len(after.sites) == len(plan_of(model).sites)
    for site in after.sites:
        assert 0 < site.low < site.high < 2
        assert len(site.class_means) == 10
        assert site.variation > 0


def test_the_model_is_not_changed() -> None:
    model = trained().train()
    model.layer2.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    excitations(model, batches())
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_fails_leaves_no_hook() -> None:
    model = trained().train()
    with pytest.raises(RuntimeError):
        excitations(model, [torch.randn(2, 5, 32, 32)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_gates_that_hardly_vary_are_noted() -> None:
    model = trained()
    nearly = model.layer1[0].se_attention
    nn.init.normal_(nearly.fc[2].weight, std=1e-4)
    assert list(excitations(model, batches()).notes) == ["layer1.0.se_attention"]
    note = excitations(model, batches()).notes["layer1.0.se_attention"]
    assert "hardly varies between inputs" in note
    assert "close to 1" in note


def test_a_site_that_is_never_called_is_noted() -> None:
    model = add_se(small_resnet())
    model.spare = add_se(small_resnet()).layer4
    found = excitations(model, batches(1))
    assert found.missed == ("spare.0.se_attention",)
    assert found.notes["spare.0.se_attention"] == "never called on these inputs"


def test_batches_may_be_tensors_alone() -> None:
    found = excitations(trained(), (x for x, _ in batches()))
    assert found.inputs == 18
    assert all(not site.class_means and site.class_spread is None for site in found.sites)
    assert excitations(trained(), batches(), max_batches=1).inputs == 6


def test_plot_has_a_row_a_stage(tmp_path: Path) -> None:
    found = excitations(trained(), batches())
    assert [len(stage) for stage in found.stages] == [1, 2, 1, 1]
    figure = found.plot(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes[2:4]
    assert [label.get_text() for label in left.get_xticklabels()] == ["layer2.0", "layer2.1"]
    assert right.get_title().startswith("layer2.1")
    drawn = {line.get_label(): line for line in right.get_lines()}
    assert {"class 0", "class 1", "class 2", "all"} <= drawn.keys()
    mean = found.stages[1][1].mean
    assert drawn["all"].get_ydata().tolist() == mean.sort().values.tolist()


def test_plot_of_gates_that_are_all_1(tmp_path: Path) -> None:
    figure = excitations(add_se(small_resnet()), batches()).plot()
    low, high = figure.axes[0].get_ylim()
    assert low < 0.96
    assert high > 1.04


def test_plot_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    found: Excitations = excitations(trained(), batches(1))
    with pytest.raises(RetrofitError, match="no suffix that matplotlib writes"):
        found.plot(tmp_path / "gates.doc")
    with pytest.raises(RetrofitError, match="no folder"):
        found.plot(tmp_path / "nowhere" / "gates.png")


def test_plain_data() -> None:
    import json

    found = excitations(trained(), batches())
    data = json.loads(json.dumps(found.to_dict()))
    assert data["inputs"] == 18
    assert len(data["sites"][0]["mean"]) == 64
    assert list(data["sites"][0]["class_means"]) == ["0", "1", "2"]


def test_mistakes() -> None:
    with pytest.raises(RetrofitError, match="the loader yields no batch"):
        excitations(add_se(small_resnet()), [])
    with pytest.raises(TypeError, match="each batch must be a tensor"):
        excitations(add_se(small_resnet()), [{"image": torch.randn(1, 3, 32, 32)}])
    with pytest.raises(RetrofitError, match="has no SE inserted by add_se"):
        excitations(small_resnet(), batches())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        excitations("resnet18", batches())  # type: ignore[arg-type]
