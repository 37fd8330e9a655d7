"""Models that are graphs already are retrofitted in their own graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from networks import NETWORKS, assert_same_function, gradients, randomise_se, randomised, run, same_tensors, se_modules
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

from se_retrofit import InsertSE, RetrofitError, add_se, plan_se, remove_se

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _traced(name: str = "resnet18") -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(randomised(torchvision.models.get_model(name, num_classes=10)).eval())


def _se_calls(module: torch.fx.GraphModule) -> list[str]:
    """The SE modules that the module's own graph calls, in order."""
    found = se_modules(module)
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module" and node.target in found]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "vgg11_bn",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("resnet50", "mobilenet_v2")),
    ],
)  # fmt: skip
def test_a_traced_network_gets_the_sites_of_the_network_itself(name: str) -> None:
    if name == "vgg11_bn":
        original: nn.Module = torchvision.models.VGG(
            torchvision.models.vgg.make_layers([8, "M", 16, 16], True), num_classes=3
        )
        original.avgpool, original.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(16, 3))
        original = randomised(original).eval()
    else:
        original = randomised(torchvision.models.get_model(name, num_classes=10)).eval()
    traced = torch.fx.symbolic_trace(original)
    retrofitted = add_se(traced)
    assert isinstance(retrofitted, torch.fx.GraphModule)
    assert not _se_calls(traced)
    assert sorted(_se_calls(retrofitted)) == sorted(se_modules(retrofitted))
    figures = [(site.kind, site.channels) for site in plan_se(original).sites]
    assert [(site.kind, site.channels) for site in plan_se(traced).sites] == figures
    assert_same_function(retrofitted, traced, X)
    # and with gates that do something, it is still the same network as the one that was not traced
    reference = randomise_se(add_se(original))
    for ours, theirs in zip(
        (retrofitted.get_submodule(path) for path in _se_calls(retrofitted)),
        se_modules(reference).values(),
        strict=True,
    ):
        ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(retrofitted(X), reference(X))
    assert not torch.equal(reference(X), original(X))


def test_the_keys_and_the_gradients_of_a_traced_network_stay() -> None:
    traced = _traced().train()
    retrofitted = add_se(traced)
    assert set(traced.state_dict()) < set(retrofitted.state_dict())
    ours, theirs = gradients(retrofitted, X), gradients(traced, X)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


def test_undo_gives_back_the_graph() -> None:
    traced = _traced()
    code, names = traced.code, [node.name for node in traced.graph.nodes]
    removed = remove_se(add_se(traced))
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


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
def test_the_placements_hold_in_a_graph(placement: str) -> None:
    original = randomised(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)).eval()
    retrofitted = add_se(torch.fx.symbolic_trace(original), placement=placement)
    assert_same_function(retrofitted, original, X)
    reference = randomise_se(add_se(original, placement=placement))
    for path, se in zip(_se_calls(retrofitted), se_modules(reference).values(), strict=True):
        retrofitted.get_submodule(path).load_state_dict(se.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(retrofitted(X), reference(X))


# torchvision's feature extractors keep a graph for each mode ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")  # torchvision's, on googlenet
@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.sweep), "googlenet"])
def test_a_feature_extractor_switches_between_its_graphs(name: str) -> None:
    kwargs = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    original = randomised(torchvision.models.get_model(name, num_classes=10, **kwargs))
    node = "layer3" if name == "resnet18" else "inception4c"
    extractor = create_feature_extractor(original, {node: "middle", "fc": "logits"})
    retrofitted = add_se(extractor.eval())
    assert isinstance(retrofitted, torch.fx.GraphModule)
    for mode in (False, True, False):
        extractor.train(mode)
        retrofitted.train(mode)
        ours, theirs = copy.deepcopy(retrofitted), copy.deepcopy(extractor)
        outputs = ours(X)
        assert list(outputs) == ["middle", "logits"]
        assert same_tensors(run(copy.deepcopy(retrofitted), X), run(theirs, X))
        assert sorted(_se_calls(retrofitted)) == sorted(se_modules(retrofitted)), mode
        changed = randomise_se(copy.deepcopy(retrofitted))
        assert not same_tensors(run(changed, X), run(theirs, X))


def test_a_feature_extractor_made_of_a_retrofitted_model_has_its_se() -> None:
    retrofitted = randomise_se(add_se(NETWORKS["torchvision/resnet18"].build()))
    extractor = create_feature_extractor(retrofitted, ["fc"])
    with torch.no_grad():
        torch.testing.assert_close(extractor(X)["fc"], retrofitted(X))


def test_timms_feature_networks_are_retrofitted() -> None:
    original = randomised(timm.create_model("resnet18", features_only=True)).eval()
    retrofitted = add_se(original)
    assert len(se_modules(retrofitted)) == 8
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
    result = PassManager(passes=[count, InsertSE(reduction=16, min_hidden=8), count])(traced)
    assert result.modified
    assert result.graph_module is traced
    assert seen[1] == seen[0] + 8
    assert {se.hidden for se in se_modules(traced).values()} == {8, 16, 32}
    assert same_tensors(run(traced, X), expected)


def test_insert_se_called_by_itself() -> None:
    traced = _traced()
    result = InsertSE(include="layer4*")(traced)
    assert result.graph_module is traced
    assert result.modified
    assert len(se_modules(traced)) == 2


def test_a_pass_that_fails_leaves_the_graph_as_it_was() -> None:
    traced = _traced()
    code, keys = traced.code, list(traced.state_dict())
    with pytest.raises(RetrofitError, match="matches none"):
        InsertSE(include="stage9")(traced)
    assert traced.code == code
    assert list(traced.state_dict()) == keys


def test_a_graph_module_inside_a_model_is_retrofitted_in_its_own_graph() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = _traced()
            self.head = nn.Linear(10, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(x))

    model = Wrapper().eval()
    retrofitted = add_se(model)
    assert len(_se_calls(retrofitted.backbone)) == 8
    assert_same_function(retrofitted, model, X)
    assert_same_function(remove_se(retrofitted), model, X)
