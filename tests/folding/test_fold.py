"""What fold_se promises: constant gates vanish into the weights, others stay, and the model given is untouched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from constant_gates import relative, with_constant_gates, with_varying_gates
from networks import (
    NETWORKS,
    Network,
    assert_same_function,
    assert_untouched,
    random_states,
    randomised,
    se_modules,
    snapshot,
)
from sweeps import swept
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import RetrofitError, add_se, fold_se, has_se, load_retrofitted, plan_of, remove_se, save_retrofitted
from se_retrofit.attention import StaticFactor
from se_retrofit.folding.factors import Factors
from se_retrofit.inspection import excitations
from se_retrofit.models import Base
from se_retrofit.saving import load_se, save_se
from se_retrofit.surgery.record.inputs import given_inputs
from se_retrofit.surgery.record.runs import record

NARROW = Base.of(
    "timm/resnet18", channels=[64, 8, 8, 8], num_classes=10
)  # layer1 takes 64 from the stem, and so has no projection
KINDS = {
    "inverted": "timm/mobilenetv2_100",  # ReLU6, which lets no factor through
    "multi-branch": "torchvision/squeezenet1_1",
    "rep-sum": "timm/repvgg_b0",
    "chain": "torchvision/vgg11",
    "convnext": "timm/convnext_atto",
    "split": "torchvision/shufflenet_v2_x0_5",
}


def narrow() -> nn.Module:
    return randomised(NARROW.build()).eval()


def pictures(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def built(kind: str) -> tuple[nn.Module, Network]:
    if kind == "dense":
        small = torchvision.models.DenseNet(8, (2, 2, 2), 16, num_classes=10)
        return randomised(small).eval(), Network("dense", 64)
    if kind == "residual":
        return narrow(), Network("residual", 32)
    network = NETWORKS[KINDS[kind]]
    return network.build(), network


@pytest.mark.parametrize(
    "kind", swept(["residual", "multi-branch", "dense"], ["inverted", "rep-sum", "chain", "convnext", "split"])
)
def test_constant_gates_vanish_into_a_plain_network_of_the_original_class(kind: str) -> None:
    original, network = built(kind)
    original.double()
    model = with_constant_gates(add_se(original, bias=True))
    x = network.input().double()
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
    for inputs in (x, network.input(batch=1, wider=32).double() * 2):
        assert relative(fresh(inputs), model(inputs)) < 1e-12
        assert relative(original(inputs), model(inputs)) > 1e-3, "the gates have no effect to fold"


# Networks of a user ---------------------------


class Unit(nn.Module):
    """A residual unit whose parts are given."""

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


def own(*units: nn.Module) -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 8, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, **options)


def images(batch: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=dtype)


def folded_from(network: nn.Module) -> tuple[nn.Module, nn.Module, Any]:
    model = with_constant_gates(add_se(network.double().eval(), bias=True, example_inputs=images()))
    folded = fold_se(model, [images()])
    report = folded.fold_report
    assert relative(folded(images()), model(images())) < 1e-12
    return model, folded, report


def test_a_weight_normalised_convolution_takes_the_gates_into_its_norm() -> None:
    unit = Unit(nn.utils.parametrizations.weight_norm(conv()), nn.Identity(), nn.LeakyReLU())
    _, folded, report = folded_from(own(unit))
    assert report.sites[0].into == ("1.conv.parametrizations.weight.original0", "1.conv.bias")
    assert not has_se(folded)


def test_a_convolution_with_standardised_weights_takes_the_gates_into_its_gain() -> None:
    _, _, report = folded_from(own(Unit(ScaledStdConv2d(8, 8, 3, padding=1), nn.Identity(), nn.ReLU())))
    assert report.sites[0].into == ("1.conv.gain", "1.conv.bias")
    _, _, report = folded_from(own(Unit(StdConv2d(8, 8, 3, padding=1), nn.Identity(), nn.ReLU())))
    assert report.sites[0].verdict == "factor"


def test_a_convolution_that_is_called_twice_takes_no_gates() -> None:
    class Twice(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.conv(self.conv(x)))

    _, folded, report = folded_from(own(Twice(conv(), nn.Identity(), nn.ReLU())))
    assert [site.verdict for site in report.sites] == ["factor"]
    assert [type(se) for se in se_modules(folded).values()] == [StaticFactor]


def test_a_weight_that_two_modules_share_takes_no_gates() -> None:
    first, second = conv(), conv()
    second.weight = first.weight
    units = [Unit(c, nn.Identity(), nn.ReLU()) for c in (first, second)]
    _, _, report = folded_from(own(*units))
    assert [site.verdict for site in report.sites] == ["factor", "factor"]


def test_the_structure_alone_rules_out_weights_that_are_used_elsewhere() -> None:
    """Without the comparison of outputs, which would catch it, too."""
    first, second, apart = conv(), conv(), conv()
    second.weight = first.weight
    network = own(*(Unit(c, nn.Identity(), nn.ReLU()) for c in (first, second, apart))).double().eval()
    model = add_se(network, example_inputs=images())
    factors = Factors(model, record(model, given_inputs(images())))
    factor = torch.full((8,), 2.0, dtype=torch.float64)
    assert factors.backwards("1.se_attention", factor) is None
    assert factors.backwards("2.se_attention", factor) is None
    scalings = factors.backwards("3.se_attention", factor)
    assert scalings is not None
    assert [s.path for s in scalings] == ["3.conv.weight", "3.conv.bias"]
    assert factors.forwards("1.se_attention", factor) is None  # an add takes it
    assert factors.backwards("3.se_attention", -factor) is None  # a ReLU lets no negative factor through


def test_a_block_that_is_called_twice_is_folded_once() -> None:
    unit = Unit(conv(), nn.BatchNorm2d(8), nn.ReLU())
    model, folded, report = folded_from(own(unit, unit))
    assert [site.verdict for site in report.sites] == ["folded"]
    assert torch.equal(folded[1].conv.weight, model[1].conv.weight)


def test_a_value_that_something_else_takes_is_not_scaled() -> None:
    class Shown(Unit):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            self.seen = y.detach().mean()
            return x + self.act(y)

    _, _, report = folded_from(own(Shown(conv(), nn.BatchNorm2d(8), nn.ReLU())))
    assert [site.verdict for site in report.sites] == ["factor"]


@pytest.mark.parametrize("act", [nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.ELU, nn.ReLU6])
def test_no_factor_goes_through_an_activation_that_is_not_homogeneous(act: Callable[[], nn.Module]) -> None:
    model, folded, report = folded_from(own(Unit(conv(), nn.BatchNorm2d(8), act())))
    assert [site.verdict for site in report.sites] == ["factor"]
    (left,) = se_modules(folded).values()
    assert isinstance(left, StaticFactor)
    assert type(folded[1]) is type(model[1])
    again = fold_se(add_se(own(Unit(conv(), nn.BatchNorm2d(8), nn.ReLU())).double(), attention="static"), [images()])
    assert not has_se(again)


def test_static_gates_fold_exactly() -> None:
    network = (
        own(Unit(conv(), nn.BatchNorm2d(8), nn.ReLU()), Unit(conv(), nn.BatchNorm2d(8), nn.ReLU())).double().eval()
    )
    model = add_se(network, attention="static", example_inputs=images())
    with torch.no_grad():
        for se in se_modules(model).values():
            se.factor.copy_(torch.rand(8) + 0.5)
    folded = fold_se(model, [images()], tolerance=0)
    report = folded.fold_report
    assert not has_se(folded)
    assert all(site.spread == site.effect == 0 for site in report.sites)
    assert relative(folded(images()), model(images())) < 1e-12


# Which sites ---------------------------


def partly_varying() -> tuple[nn.Module, Tensor, tuple[str, str]]:
    varying = ("layer2.0.se_attention", "layer3.1.se_attention")
    model = with_varying_gates(copy.deepcopy(constant_resnet()), *varying)
    return model, pictures(), varying


@cache
def constant_resnet() -> nn.Module:
    torch.manual_seed(0)  # a fixture of the module is made before that of the test that sets the seed
    return with_constant_gates(add_se(narrow(), bias=True))


@pytest.fixture(scope="module")
def partly_folded() -> nn.Module:
    model, x, _ = partly_varying()
    return fold_se(model, TensorDataset(x), tolerance=1e-4)


def test_gates_that_vary_stay_and_the_others_go(partly_folded: nn.Module) -> None:
    model, x, varying = partly_varying()
    report = partly_folded.fold_report
    assert tuple(se_modules(partly_folded)) == varying
    assert {site.path for site in report.sites if site.verdict == "kept"} == set(varying)
    for site in report.sites:
        assert (site.effect > 1e-4) == (site.spread > 0.01) == (site.path in varying), site
    assert report.change <= 1e-4
    assert relative(partly_folded(x), model(x)) < 1e-4
    assert [site.path for site in plan_of(partly_folded).sites] == list(varying)
    lines = str(report).splitlines()
    assert len(lines) == 2 + 8 + 2
    assert [line.split()[0] for line in lines if line.endswith("kept by outputs")] == list(varying)
    assert "6 of 8 sites folded, 0 left as constant factors, 2 kept; over 4 inputs" in lines
    assert report.to_dict()["sites"][0]["verdict"] == "folded"


def test_what_is_left_can_be_folded_removed_saved_and_loaded(partly_folded: nn.Module, tmp_path: Path) -> None:
    _, x, varying = partly_varying()
    loaded = load_retrofitted(save_retrofitted(partly_folded, tmp_path / "saved"))
    assert_same_function(loaded, partly_folded, x)
    assert not has_se(remove_se(loaded))
    everything = fold_se(loaded, [x], tolerance=100)
    assert everything.fold_report.folded == varying
    for bare in (everything, remove_se(loaded)):
        with pytest.raises(RetrofitError, match="no SE inserted by add_se"):
            fold_se(bare, [x])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        fold_se("resnet18", [x])  # type: ignore[type-var]


class Pair(nn.Module):
    """A block of a chain that has two sites."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)))


def test_a_block_of_which_one_of_two_sites_is_folded_is_saved_and_loaded(tmp_path: Path) -> None:
    layers = nn.Sequential(Pair(3, 8), Pair(8, 16), nn.Conv2d(16, 4, 1))
    base, x = randomised(layers).eval(), torch.randn(4, 3, 16, 16)
    model = with_constant_gates(add_se(base, bias=True, example_inputs=x))
    varying = "1.se_attention"
    folded = fold_se(with_varying_gates(model, varying), [x], tolerance=1e-4)
    report = folded.fold_report
    assert [site.path for site in plan_of(folded).sites] == [varying]
    assert report.folded == ("0.se_attention", "0.se_attention_2", "1.se_attention_2")
    saved = save_retrofitted(folded, tmp_path / "saved")
    loaded = load_retrofitted(saved, base=base)
    assert_same_function(loaded, folded, x)
    again = load_retrofitted(save_retrofitted(loaded, tmp_path / "again"), base=base)  # what was loaded tells as much
    assert_same_function(again, folded, x)
    alone = load_se(base, save_se(folded, tmp_path / "se.safetensors"))
    assert [site.path for site in plan_of(alone).sites] == [varying]


def test_factors_that_are_left_are_saved_and_loaded(tmp_path: Path) -> None:
    x = pictures(2)
    model = with_constant_gates(add_se(narrow(), bias=True, placement="post"))
    folded = fold_se(model, [x])
    report = folded.fold_report
    # behind the second block of a stage there are convolutions alone: that of the next branch and that of its shortcut;
    # a block with a projection is a sum of two norms
    assert [site.verdict for site in report.sites] == ["factor", *["folded"] * 7]
    assert report.sites[1].into == ("layer2.0.conv1.weight", "layer2.0.downsample.0.weight")
    assert report.sites[2].into[::2] == ("layer2.0.bn2.weight", "layer2.0.downsample.1.weight")
    assert report.sites[-1].into == ("fc.weight",)  # through the pooling
    assert_same_function(load_retrofitted(save_retrofitted(folded, tmp_path / "saved")), folded, x)
    with pytest.raises(RetrofitError, match=r"nothing left to fold: .*layer1.0.se_attention"):
        fold_se(folded, [x])


def test_a_site_is_kept_where_the_accuracy_drops_by_more_than_one_image() -> None:
    model, _, varying = partly_varying()
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
        assert {site.path for site in report.sites if site.verdict == "kept"} <= set(varying)
        assert report.inputs == len(chosen)
        assert (report.accuracy_after < report.accuracy_before == 1) == (wrong == 1)
        assert f"accuracy: 100.00% before, {report.accuracy_after:.2%} after" in str(report)


# What is not touched ---------------------------


def test_only_in_place_is_the_model_touched_and_never_the_random_states() -> None:
    model, x, _ = partly_varying()
    model.train()
    before, states, weight = snapshot(model), list(random_states()), model.layer1[0].bn2.weight
    folded = fold_se(model, DataLoader(TensorDataset(x), 2, shuffle=True))
    assert_untouched(model, before)
    assert all(module.training for module in folded.modules())
    assert fold_se(model, [x], inplace=True) is model
    assert model.layer1[0].bn2.weight is weight
    assert list(random_states()) == states
    assert relative(model.eval()(x), folded.eval()(x)) < 1e-5


class Wrong:
    def __iter__(self) -> Iterator[Any]:
        yield {"image": 1}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"data": []}, RetrofitError, "yields no batch"),
        ({"data": [torch.empty(0, 3, 32, 32)]}, RetrofitError, "yields no batch"),
        ({"data": torch.zeros(1, 3, 32, 32)}, TypeError, "data must be a Dataset"),
        ({"data": Wrong()}, TypeError, "each batch must be a tensor"),
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
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    model, x, _ = partly_varying()
    before = snapshot(model)
    with pytest.raises(error, match=says.replace("*", r"\*")):
        fold_se(model, **{"data": [x], "inplace": True, **options})
    assert_untouched(model, before)


def test_a_model_whose_outputs_are_all_zero_is_refused() -> None:
    model, x, _ = partly_varying()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    with pytest.raises(RetrofitError, match="outputs on the data are all zero"):
        fold_se(model, [x])


def test_outputs_in_an_object_and_one_number_an_image_are_compared_without_an_accuracy() -> None:
    model, x, _ = partly_varying()
    model.register_forward_hook(lambda module, args, logits: SimpleNamespace(score=logits[:, :1]))
    report: Any = fold_se(model, [(x, torch.zeros(len(x), dtype=torch.long))]).fold_report
    assert report.folded
    assert report.accuracy_before is None  # a single number names no class


def test_data_come_in_the_dtype_of_the_network() -> None:
    model, x, _ = partly_varying()
    report: Any = fold_se(model.double(), [x]).fold_report
    assert report.folded
    assert excitations(model, [x]).inputs == len(x)
