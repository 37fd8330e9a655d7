"""Models that are graphs already are retrofitted in their own graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from block_networks import OfTraining
from networks import (
    PLACEMENTS,
    assert_same_function,
    gradients,
    narrow_resnet,
    randomise_se,
    randomised,
    run,
    same_tensors,
    se_modules,
)
from structure import Unit
from sweeps import swept
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torchvision.models.feature_extraction import create_feature_extractor

from se_retrofit import InsertSE, RetrofitError, add_se, plan_se, remove_se

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _traced() -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(narrow_resnet())


def _se_calls(module: torch.fx.GraphModule) -> list[str]:
    """The SE modules that the module's own graph calls, in order."""
    found = se_modules(module)
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module" and node.target in found]


def _assert_same_with_gates(retrofitted: torch.fx.GraphModule, original: nn.Module, **options: str) -> None:
    """The same function as the original's, and with gates that do something, as the retrofitted original's."""
    assert_same_function(retrofitted, original, X)
    reference = randomise_se(add_se(original, **options))
    for path, theirs in zip(_se_calls(retrofitted), se_modules(reference).values(), strict=True):
        retrofitted.get_submodule(path).load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(retrofitted(X), reference(X))
        assert not torch.equal(reference(X), original(X))


def test_a_decomposed_program_whose_norms_return_tuples_is_retrofitted() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), Unit())).eval()
    program = make_fx(model)(X)
    with_se = add_se(program, example_inputs=X)
    assert torch.equal(with_se(X), program(X))
    assert torch.equal(remove_se(with_se)(X), program(X))
    assert not torch.equal(randomise_se(with_se)(X), program(X))


def _vgg() -> nn.Module:
    layers = torchvision.models.vgg.make_layers([8, "M", 16, 16], True)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    "name", swept(["vgg", "squeezenet1_1"], ["shufflenet_v2_x0_5", "resnet18", "resnet50", "mobilenet_v2"])
)
def test_a_traced_network_gets_the_sites_of_the_network_itself(name: str) -> None:
    original = randomised(_vgg() if name == "vgg" else torchvision.models.get_model(name, num_classes=10)).eval()
    traced = torch.fx.symbolic_trace(original)
    retrofitted = add_se(traced)
    assert isinstance(retrofitted, torch.fx.GraphModule)
    assert not _se_calls(traced)
    assert sorted(_se_calls(retrofitted)) == sorted(se_modules(retrofitted))
    figures = [(site.kind, site.channels) for site in plan_se(original).sites]
    assert [(site.kind, site.channels) for site in plan_se(traced).sites] == figures
    _assert_same_with_gates(retrofitted, original)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_placements_hold_in_a_graph(placement: str) -> None:
    original = narrow_resnet()
    retrofitted = add_se(torch.fx.symbolic_trace(original), placement=placement)
    _assert_same_with_gates(retrofitted, original, placement=placement)


def test_the_keys_and_the_gradients_of_a_traced_network_stay_and_undo_gives_back_its_graph() -> None:
    traced = _traced().train()
    code, names = traced.code, [node.name for node in traced.graph.nodes]
    retrofitted = add_se(traced)
    assert set(traced.state_dict()) < set(retrofitted.state_dict())
    ours, theirs = gradients(retrofitted, X), gradients(traced, X)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    removed = remove_se(retrofitted)
    assert removed.code == code
    assert [node.name for node in removed.graph.nodes] == names
    assert list(removed.state_dict()) == list(traced.state_dict())
    assert [path for path, _ in removed.named_modules()] == [path for path, _ in traced.named_modules()]


def test_a_retrofitted_graph_is_sound_and_copies_and_pickles() -> None:
    retrofitted = randomise_se(add_se(_traced()))
    retrofitted.graph.lint()
    for twin in (
        copy.deepcopy(retrofitted),
        pickle.loads(pickle.dumps(retrofitted)),
        torch.fx.symbolic_trace(retrofitted),
    ):
        assert_same_function(twin, retrofitted, X)


# torchvision's feature extractors keep a graph for each mode ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")  # torchvision's
def test_a_feature_extractor_switches_between_its_graphs() -> None:
    extractor = create_feature_extractor(randomised(OfTraining()), {"unit": "middle", "fc": "logits"})
    retrofitted = add_se(extractor.eval())
    assert isinstance(retrofitted, torch.fx.GraphModule)
    for mode in (False, True, False):
        extractor.train(mode)
        retrofitted.train(mode)
        assert list(copy.deepcopy(retrofitted)(X)) == ["middle", "logits"]
        expected = run(copy.deepcopy(extractor), X)
        assert same_tensors(run(copy.deepcopy(retrofitted), X), expected)
        assert len(_se_calls(retrofitted)) == len(se_modules(retrofitted)) == 1
        assert not same_tensors(run(randomise_se(copy.deepcopy(retrofitted)), X), expected)


def test_a_feature_extractor_made_of_a_retrofitted_model_has_its_se() -> None:
    retrofitted = randomise_se(add_se(narrow_resnet()))
    extractor = create_feature_extractor(retrofitted, ["fc"])
    with torch.no_grad():
        torch.testing.assert_close(extractor(X)["fc"], retrofitted(X))


def test_timms_feature_networks_are_retrofitted() -> None:
    original = randomised(timm.create_model("test_resnet", features_only=True)).eval()
    retrofitted = add_se(original)
    assert len(se_modules(retrofitted)) == 4
    assert retrofitted.feature_info.channels() == original.feature_info.channels()
    assert_same_function(retrofitted, original, X)


# The pass ---------------------------


def test_insert_se_works_in_a_pass_manager_among_other_passes() -> None:
    seen: list[int] = []

    def count(module: torch.fx.GraphModule) -> PassResult:
        seen.append(len(list(module.graph.nodes)))
        return PassResult(module, False)

    traced = _traced()
    expected = run(traced, X)
    result = PassManager(passes=[count, InsertSE(reduction=2, min_hidden=6, include="layer[23]*"), count])(traced)
    assert result.modified
    assert result.graph_module is traced
    assert seen[1] == seen[0] + 2
    assert {se.hidden for se in se_modules(traced).values()} == {6, 8}
    assert same_tensors(run(traced, X), expected)


def test_a_pass_that_fails_leaves_the_graph_as_it_was() -> None:
    traced = _traced()
    code, keys = traced.code, list(traced.state_dict())
    with pytest.raises(RetrofitError, match="stage9"):
        InsertSE(include="stage9")(traced)
    assert traced.code == code
    assert list(traced.state_dict()) == keys


def test_a_graph_module_inside_a_model_is_retrofitted_in_its_own_graph() -> None:
    model = nn.Sequential(_traced(), nn.Linear(10, 2)).eval()
    retrofitted = add_se(model)
    assert len(_se_calls(retrofitted[0])) == 4
    assert_same_function(retrofitted, model, X)
    assert_same_function(remove_se(retrofitted), model, X)
