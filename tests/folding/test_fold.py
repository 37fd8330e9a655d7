"""What fold_se promises: constant gates vanish into the weights, others stay, and the model given is untouched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from networks import (
    NETWORKS,
    assert_same_function,
    assert_untouched,
    random_states,
    randomised,
    se_modules,
    snapshot,
)
from own_networks import Unit, conv, images, own, relative, with_constant_gates, with_varying_gates
from sweeps import swept
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import RetrofitError, add_se, fold_se, has_se, load_retrofitted, plan_of, remove_se, save_retrofitted
from se_retrofit.attention import StaticFactor
from se_retrofit.inspection import excitations
from se_retrofit.models import Base

# layer1 takes 64 from the stem, and so has no projection
NARROW = Base.of("timm/resnet18", channels=[64, 8, 8, 8], num_classes=10)


def narrow() -> nn.Module:
    return randomised(NARROW.build()).eval()


def pictures(batch: int, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, 32, width, generator=torch.Generator().manual_seed(3))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": narrow,
    "multi-branch": NETWORKS["torchvision/squeezenet1_1"].build,
    "dense": lambda: randomised(torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10)).eval(),
    "inverted": NETWORKS["timm/mobilenetv2_100"].build,  # ReLU6, which lets no factor through
    "rep-sum": NETWORKS["timm/repvgg_b0"].build,
    "chain": NETWORKS["torchvision/vgg11"].build,
    "convnext": NETWORKS["timm/convnext_atto"].build,
    "split": NETWORKS["torchvision/shufflenet_v2_x0_5"].build,
}


@pytest.mark.parametrize("kind", swept(list(KINDS)[:3], list(KINDS)[3:]))
def test_constant_gates_vanish_into_a_plain_network_of_the_original_class(kind: str) -> None:
    original, x = KINDS[kind]().double(), pictures(2).double()
    model = with_constant_gates(add_se(original, bias=True))
    folded = fold_se(model, [x])
    report = folded.fold_report
    assert len(report.folded) == len(report.sites) == len(plan_of(model).sites)
    assert not has_se(folded)
    assert [(path, type(m)) for path, m in folded.named_modules()] == [
        (p, type(m)) for p, m in original.named_modules()
    ]
    assert list(folded.state_dict()) == list(original.state_dict())
    assert b"se_retrofit" not in pickle.dumps(folded)  # nor is this package needed to load it whole
    assert copy.deepcopy(folded).fold_report is report
    fresh = copy.deepcopy(original)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    for inputs in (x, pictures(1, width=64).double() * 2):
        assert relative(fresh(inputs), model(inputs)) < 1e-12
        assert relative(original(inputs), model(inputs)) > 1e-3, "the gates have no effect to fold"


# Networks of a user ---------------------------


class TwiceConvolved(Unit):
    def branch(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.conv(x)))


class Shown(Unit):
    """Something else takes the value that could be scaled."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        self.seen = y.detach().mean()
        return self.act(y)


def of_one_weight() -> list[nn.Module]:
    first, second = conv(), conv()
    second.weight = first.weight
    return [Unit(c, nn.Identity(), nn.ReLU()) for c in (first, second)]


def unit(layer: nn.Module, act: Callable[[], nn.Module] = nn.ReLU, cls: type[Unit] = Unit) -> list[nn.Module]:
    return [cls(layer, nn.Identity(), act())]


def with_norm(act: Callable[[], nn.Module], cls: type[Unit] = Unit) -> list[nn.Module]:
    return [cls(conv(), nn.BatchNorm2d(8), act())]


NORM = ("1.norm.weight", "1.norm.bias")
UNITS: dict[str, tuple[Callable[[], list[nn.Module]], list[Any]]] = {
    "weight norm": (
        lambda: unit(nn.utils.parametrizations.weight_norm(conv()), nn.LeakyReLU),
        [("1.conv.parametrizations.weight.original0", "1.conv.bias")],
    ),
    "a gain": (lambda: unit(ScaledStdConv2d(8, 8, 3, padding=1)), [("1.conv.gain", "1.conv.bias")]),
    "standardised weights": (lambda: unit(StdConv2d(8, 8, 3, padding=1)), ["factor"]),
    "a convolution called twice": (lambda: unit(conv(), cls=TwiceConvolved), ["factor"]),
    "a weight of two modules": (of_one_weight, ["factor", "factor"]),
    "a block called twice": (lambda: with_norm(nn.ReLU) * 2, [NORM]),
    "a value taken elsewhere": (lambda: with_norm(nn.ReLU, Shown), ["factor"]),
    "SiLU": (lambda: with_norm(nn.SiLU), ["factor"]),
    "Hardswish": (lambda: with_norm(nn.Hardswish), ["factor"]),
    "Sigmoid": (lambda: with_norm(nn.Sigmoid), ["factor"]),
    "ELU": (lambda: with_norm(nn.ELU), ["factor"]),
    "ReLU6": (lambda: with_norm(nn.ReLU6), ["factor"]),
}


@pytest.mark.parametrize("case", UNITS)
def test_gates_go_into_what_alone_they_scale_and_stay_as_factors_elsewhere(case: str) -> None:
    units, wanted = UNITS[case]
    model = with_constant_gates(add_se(own(*units()), bias=True, example_inputs=images()))
    folded = fold_se(model, [images()])
    assert relative(folded(images()), model(images())) < 1e-12
    sites = folded.fold_report.sites
    assert [site.into if site.verdict == "folded" else site.verdict for site in sites] == wanted
    left = list(se_modules(folded).values())
    assert [type(se) for se in left] == [StaticFactor] * wanted.count("factor")
    assert (type(folded[1]) is type(model[1])) == bool(left)


def test_static_gates_fold_exactly() -> None:
    model = add_se(own(*with_norm(nn.ReLU), *with_norm(nn.ReLU)), attention="static", example_inputs=images())
    with torch.no_grad():
        for se in se_modules(model).values():
            se.factor.copy_(torch.rand(8) + 0.5)
    folded = fold_se(model, [images()], tolerance=0)
    assert not has_se(folded)
    assert all(site.spread == site.effect == 0 for site in folded.fold_report.sites)
    assert relative(folded(images()), model(images())) < 1e-12


# Which sites ---------------------------

VARYING = ("layer2.0.se_attention", "layer3.1.se_attention")
X = pictures(4)


@cache
def constant_resnet() -> nn.Module:
    torch.manual_seed(0)  # a fixture of the module is made before that of the test that sets the seed
    return with_constant_gates(add_se(narrow(), bias=True))


@pytest.fixture
def model() -> nn.Module:
    return with_varying_gates(copy.deepcopy(constant_resnet()), *VARYING)


@pytest.fixture(scope="module")
def partly_folded() -> nn.Module:
    model = with_varying_gates(copy.deepcopy(constant_resnet()), *VARYING)
    return fold_se(model, TensorDataset(X), tolerance=1e-4)


def test_gates_that_vary_stay_and_the_others_go(partly_folded: nn.Module, model: nn.Module) -> None:
    report = partly_folded.fold_report
    assert tuple(se_modules(partly_folded)) == VARYING
    assert {site.path for site in report.sites if site.verdict == "kept"} == set(VARYING)
    for site in report.sites:
        assert (site.effect > 1e-4) == (site.spread > 0.01) == (site.path in VARYING), site
    assert report.change <= 1e-4
    assert relative(partly_folded(X), model(X)) < 1e-4
    assert [site.path for site in plan_of(partly_folded).sites] == list(VARYING)
    lines = str(report).splitlines()
    assert len(lines) == 2 + 8 + 2
    assert [line.split()[0] for line in lines if line.endswith("kept by outputs")] == list(VARYING)
    assert "6 of 8 sites folded, 0 left as constant factors, 2 kept; over 4 inputs" in lines
    assert report.to_dict()["sites"][0]["verdict"] == "folded"


def test_what_is_left_can_be_folded_removed_saved_and_loaded(partly_folded: nn.Module, tmp_path: Path) -> None:
    loaded = load_retrofitted(save_retrofitted(partly_folded, tmp_path / "saved"))
    assert_same_function(loaded, partly_folded, X)
    assert not has_se(remove_se(loaded))
    everything = fold_se(loaded, [X], tolerance=100)
    assert everything.fold_report.folded == VARYING
    for bare in (everything, remove_se(loaded)):
        with pytest.raises(RetrofitError, match="no SE inserted by add_se"):
            fold_se(bare, [X])


def test_factors_go_into_all_that_takes_them() -> None:
    folded = fold_se(with_constant_gates(add_se(narrow(), bias=True, placement="post")), [X])
    sites = folded.fold_report.sites
    # behind the second block of a stage there are convolutions alone: that of the next branch and that of its shortcut;
    # a block with a projection is a sum of two norms
    assert [site.verdict for site in sites] == ["factor", *["folded"] * 7]
    assert sites[1].into == ("layer2.0.conv1.weight", "layer2.0.downsample.0.weight")
    assert sites[2].into[::2] == ("layer2.0.bn2.weight", "layer2.0.downsample.1.weight")
    assert sites[-1].into == ("fc.weight",)  # through the pooling
    with pytest.raises(RetrofitError, match=r"nothing left to fold: .*layer1.0.se_attention"):
        fold_se(folded, [X])


def test_a_site_is_kept_where_the_accuracy_drops_by_more_than_one_image(model: nn.Module) -> None:
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = model.eval()(x)
        changed = fold_se(model, [x], tolerance=100)(x).argmax(1) != before.argmax(1)
    assert changed.sum() > 1
    for wrong, kept in ((1, set()), (int(changed.sum()), {"accuracy"})):
        chosen = torch.cat([x[~changed], x[changed][:wrong]])
        data = DataLoader(TensorDataset(chosen, model(chosen).argmax(1)), 8)
        report = fold_se(model, data, tolerance=100, max_accuracy_loss=0).fold_report
        assert {site.kept_by for site in report.sites if site.verdict == "kept"} == kept
        assert {site.path for site in report.sites if site.verdict == "kept"} <= set(VARYING)
        assert report.inputs == len(chosen)
        assert (report.accuracy_after < report.accuracy_before == 1) == (wrong == 1)
        assert f"accuracy: 100.00% before, {report.accuracy_after:.2%} after" in str(report)


# What is not touched ---------------------------


def test_only_in_place_is_the_model_touched_and_never_the_random_states(model: nn.Module) -> None:
    model.train()
    before, states, weight = snapshot(model), list(random_states()), model.layer1[0].bn2.weight
    folded = fold_se(model, DataLoader(TensorDataset(X), 2, shuffle=True))
    assert_untouched(model, before)
    assert all(module.training for module in folded.modules())
    assert fold_se(model, [X], inplace=True) is model
    assert model.layer1[0].bn2.weight is weight
    assert list(random_states()) == states
    assert relative(model.eval()(X), folded.eval()(X)) < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"model": "resnet18"}, TypeError, r"model must be an nn\.Module"),
        ({"data": []}, RetrofitError, "yields no batch"),
        ({"data": [torch.empty(0, 3, 32, 32)]}, RetrofitError, "yields no batch"),
        ({"data": torch.zeros(1, 3, 32, 32)}, TypeError, "data must be a Dataset"),
        ({"data": [{"image": 1}]}, TypeError, "a batch must be a tensor"),
        ({"data": [torch.full((1, 3, 32, 32), float("nan"))]}, RetrofitError, "not finite"),
        ({"data": [torch.zeros(1, 4, 32, 32)]}, RuntimeError, "channels"),
        ({"tolerance": -1}, RetrofitError, "tolerance must be at least 0"),
        ({"tolerance": float("nan")}, RetrofitError, "tolerance must be at least 0"),
        ({"tolerance": "1"}, TypeError, "tolerance must be a number"),
        ({"max_accuracy_loss": -0.1}, RetrofitError, "max_accuracy_loss must be at least 0"),
        ({"max_batches": 0}, RetrofitError, "max_batches must be at least 1"),
        ({"max_batches": 1.5}, TypeError, "max_batches must be a positive int"),
    ],
)
def test_bad_input_is_refused_with_the_reason_and_changes_nothing(
    options: dict[str, Any], error: type[Exception], says: str, model: nn.Module
) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=says):
        fold_se(**{"model": model, "data": [X], "inplace": True, **options})
    assert_untouched(model, before)


def test_a_model_whose_outputs_are_all_zero_is_refused(model: nn.Module) -> None:
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    with pytest.raises(RetrofitError, match="outputs on the data are all zero"):
        fold_se(model, [X])


def test_outputs_in_an_object_and_one_number_an_image_are_compared_without_an_accuracy(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, logits: SimpleNamespace(score=logits[:, :1]))
    report: Any = fold_se(model, [(X, torch.zeros(len(X), dtype=torch.long))]).fold_report
    assert report.folded
    assert report.accuracy_before is None  # a single number names no class


def test_data_come_in_the_dtype_of_the_network(model: nn.Module) -> None:
    report: Any = fold_se(model.double(), [X]).fold_report
    assert report.folded
    assert excitations(model, [X]).inputs == len(X)
