"""SE is in the right places: against networks that others built with SE, and against forwards written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from block_networks import C2f
from networks import NETWORKS, PLACEMENTS, randomise_se, randomised, run, se_modules
from structure import Unit, conv
from sweeps import swept
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from se_retrofit import RetrofitError, SEAttention, add_se, from_native, plan_se

# Native SE networks ---------------------------


@pytest.mark.parametrize(
    ("base", "native", "options"),
    [
        ("resnet18", "seresnet18", {"min_hidden": 8}),
        pytest.param("resnet50", "seresnet50", {}, marks=pytest.mark.sweep),
        # timm has it inside the branch here
        pytest.param("resnext26ts", "seresnext26ts", {"min_hidden": 8, "placement": "3x3"}, marks=pytest.mark.sweep),
    ],
)
def test_a_retrofit_with_the_weights_of_timms_native_se_network_is_that_network(
    base: str, native: str, options: dict[str, Any]
) -> None:
    theirs = randomised(timm.create_model(native, num_classes=10)).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "fc1." in name or "fc2." in name:
                parameter.normal_(std=0.5)
    ours = (
        timm.create_model(base, num_classes=10).double().eval()
    )  # so that rounding is small after the norms of small batches
    ours = from_native(add_se(ours, reduction=16, gate="sigmoid", bias=True, **options), theirs)
    x = torch.randn(4, 3, 64, 64).double()
    for train in (False, True):
        expected, found = run(theirs.train(train), x)[0], run(ours.train(train), x)[0]
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_the_sites_of_mnasnet_are_those_of_timms_semnasnet() -> None:
    """semnasnet has SE in some stages only. Without it, and retrofitted in those stages, it is itself again."""
    native = randomised(timm.create_model("semnasnet_100", num_classes=10)).eval()
    bare = timm.create_model("semnasnet_100", num_classes=10).eval()
    bare.load_state_dict(native.state_dict())
    squeezes = {path: m for path, m in native.named_modules() if type(m).__name__ == "SqueezeExcite"}
    blocks = [path.rpartition(".")[0] for path in squeezes]
    for block in blocks:
        bare.get_submodule(block).se = nn.Identity()
    places = {(type(bare.get_submodule(site.block)).__name__, site.after) for site in plan_se(bare).sites}
    assert places == {("DepthwiseSeparableConv", "bn1"), ("InvertedResidual", "bn2")}
    ours = add_se(bare, gate="sigmoid", bias=True, include=blocks)
    assert [path.rpartition(".")[0] for path in se_modules(ours)] == blocks
    for se, theirs in zip(se_modules(ours).values(), squeezes.values(), strict=True):
        assert se.channel == theirs.conv_expand.out_channels
        hidden = theirs.conv_reduce.out_channels  # a quarter of the block's input: not a ratio of ours
        se.fc[0], se.fc[2] = nn.Linear(se.channel, hidden), nn.Linear(hidden, se.channel)
        for layer, theirs_layer in ((se.fc[0], theirs.conv_reduce), (se.fc[2], theirs.conv_expand)):
            nn.init.normal_(theirs_layer.weight, std=0.5)
            layer.load_state_dict({"weight": theirs_layer.weight.flatten(1), "bias": theirs_layer.bias})
    x = torch.randn(2, 3, 64, 64)
    expected, found = run(native, x)[0], run(ours, x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# The sizes in the paper ---------------------------

MILLIONS = {2: 45.7, 4: 35.7, 8: 30.7, 16: 28.1, 32: 26.9}


def _resnet50() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet50()


def _millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("reduction", swept([16], [2, 4, 8, 32]))
def test_parameters_of_se_resnet50_are_those_of_the_papers_table_10(reduction: int) -> None:
    """With biases, as in the networks that the authors released: without, r = 8 would give 30.59."""
    model = _resnet50()
    assert _millions(model) == pytest.approx(25.6, abs=0.1)
    assert _millions(add_se(model, reduction, bias=True)) == pytest.approx(MILLIONS[reduction], abs=0.1)
    # without biases (2 / r) * sum over stages of N_s * C_s ** 2 (section 4)
    stages = ((3, 256), (4, 512), (6, 1024), (3, 2048))
    assert plan_se(model, reduction).parameters == sum(2 * n * c * c for n, c in stages) // reduction


def test_se_inside_the_branch_costs_less_as_in_the_papers_table_14() -> None:
    assert _millions(add_se(_resnet50(), 16, placement="3x3")) == pytest.approx(25.8, abs=0.1)


# The five placements ---------------------------


def _by_hand(block: BasicBlock | Bottleneck, se: SEAttention, placement: str, x: Tensor) -> Tensor:
    """Figure 5 of the paper. The last conv of a basic block is a 3x3 conv with no activation of its own before the add:
    the paper's "3x3" goes behind the spatial conv that has its norm and activation within the branch."""
    branch = se(x) if placement == "pre" else x
    branch = block.relu(block.bn1(block.conv1(branch)))
    if isinstance(block, Bottleneck):
        branch = block.relu(block.bn2(block.conv2(branch)))
    if placement == "3x3":
        branch = se(branch)
    branch = block.bn3(block.conv3(branch)) if isinstance(block, Bottleneck) else block.bn2(block.conv2(branch))
    if placement == "standard":
        branch = se(branch)
    skip = x if block.downsample is None else block.downsample(x)
    if placement == "identity":
        skip = se(skip)
    out = torch.relu(branch + skip)
    return se(out) if placement == "post" else out


def _unit(kind: type[nn.Module], projected: bool, width: int = 8) -> nn.Module:
    """A residual unit of torchvision, with a projection on its skip or without."""
    outputs = width * kind.expansion  # type: ignore[attr-defined]
    inputs = 2 * outputs if projected else outputs
    down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)) if projected else None
    return randomised(kind(inputs, width, 2 if projected else 1, down)).eval()  # type: ignore[call-arg]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_each_placement_is_the_papers(kind: type[nn.Module], projected: bool, placement: str) -> None:
    block = _unit(kind, projected)
    channels = block.conv1.in_channels
    stem = nn.Conv2d(channels, channels, 1)
    example = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        retrofitted = add_se(nn.Sequential(stem, block), 2, placement=placement, example_inputs=example)[1]
        assert torch.equal(retrofitted(example), block(example))
        randomise_se(retrofitted)
        (se,) = se_modules(retrofitted).values()
        for x in (example, torch.randn(3, channels, 12, 10)):
            expected = _by_hand(block, se, placement, x)
            torch.testing.assert_close(retrofitted(x), expected)
            for other in {*PLACEMENTS} - {placement}:
                width = {"pre": channels, "3x3": 8}.get(other, expected.shape[1])
                if width == se.channel:
                    assert not torch.allclose(_by_hand(block, se, other, x), expected), other


def test_auto_is_standard_for_residual_units_and_no_other_kind_has_any_other_placement() -> None:
    model = nn.Sequential(conv(3, 8), Unit(), C2f())
    auto, standard, post = (plan_se(model, placement=placement).sites for placement in ("auto", "standard", "post"))
    assert [site.kind for site in auto] == ["residual", "multi-branch"]
    assert auto[0] == standard[0]
    assert [site.block for site in post] == ["1"]
    for placement in ("pre", "post"):
        skipped = plan_se(model, placement=placement).skipped
        assert {skip.block for skip in skipped if "multi-branch" in skip.reason} == {"2"}
        with pytest.raises(RetrofitError, match=rf"'{placement}' .* multi-branch"):
            plan_se(nn.Sequential(conv(3, 8), C2f()), placement=placement)


@pytest.mark.sweep
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/convnext_atto", "torchvision/mobilenet_v2"])
def test_each_placement_keeps_the_outputs(name: str, placement: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    plan, auto = plan_se(model, placement=placement), plan_se(model)
    retrofitted = add_se(model, placement=placement)
    with torch.no_grad():
        assert torch.equal(retrofitted(network.input()), model(network.input()))
        assert not torch.allclose(randomise_se(retrofitted)(network.input()), model(network.input()))
    # mobilenet_v2's blocks without a skip are no residual units
    assert {s.block for s in (*plan.sites, *plan.skipped)} == {s.block for s in (*auto.sites, *auto.skipped)}


# Which blocks, of which kind ---------------------------

# By the names of the classes that the libraries give their blocks.
BLOCKS = {
    "torchvision/squeezenet1_1": {"multi-branch": "Fire"},
    "torchvision/shufflenet_v2_x0_5": {"dense multi-branch": "InvertedResidual"},
    "timm/mobilenetv2_100": {"inverted": "InvertedResidual DepthwiseSeparableConv"},
    "timm/repvgg_b0": {"rep-sum": "RepVggBlock"},
    "timm/convnext_atto": {"residual": "ConvNeXtBlock"},
}
MORE_BLOCKS = {
    "torchvision/resnet50": {"residual": "Bottleneck"},
    "torchvision/densenet121": {"dense": "_DenseLayer"},
    "torchvision/googlenet": {"multi-branch": "Inception"},
    "torchvision/inception_v3": {"multi-branch": "InceptionA InceptionB InceptionC InceptionD InceptionE"},
    "torchvision/regnet_x_400mf": {"residual": "ResBottleneckBlock"},
    "timm/resnetv2_50": {"residual": "PreActBottleneck"},
    "timm/densenet121": {"dense": "DenseLayer"},
    "timm/dla34": {"residual": "DlaBasic"},
    "timm/res2net50_26w_4s": {"residual": "Bottle2neck"},
    "timm/hrnet_w18_small": {"residual": "BasicBlock Bottleneck"},
    "timm/cspdarknet53": {"residual": "DarkBlock"},
    "timm/vovnet39a": {"multi-branch": "OsaBlock"},
    "timm/nf_resnet50": {"residual": "NormFreeBlock"},
    "timm/dpn68": {"dense": "DualPathBlock"},
    "timm/inception_resnet_v2": {
        "residual": "Block35 Block17 Block8",
        "multi-branch": "Mixed_5b Mixed_6a Mixed_7a Mixed5b Mixed6a Mixed7a",
    },
}


@pytest.mark.parametrize("name", swept(BLOCKS, MORE_BLOCKS))
def test_each_block_of_the_network_gets_one_se_and_nothing_else_does(name: str) -> None:
    model = NETWORKS[name].build()
    plan = plan_se(model)
    expected = {}
    for kinds, classes in (BLOCKS | MORE_BLOCKS)[name].items():
        paths = {path for path, module in model.named_modules() if type(module).__name__ in classes.split()}
        expected |= dict.fromkeys(paths, kinds.split())
    assert len(plan.sites) == len(expected)
    assert expected.keys() == {site.block for site in plan.sites}
    assert all(site.kind in expected[site.block] for site in plan.sites)
    assert not expected.keys() & {skip.block for skip in plan.skipped}


def test_se_comes_before_stochastic_depth_and_layer_scale() -> None:
    """A gate behind the layer scale (1e-6 in a fresh ConvNeXt) would get next to no gradient."""
    retrofitted = add_se(nn.Sequential(conv(3, 8), CNBlock(8, 1e-6, 0.1)))
    order: list[str] = []
    block = retrofitted[1]
    for name, module in block.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    retrofitted.eval()(torch.randn(1, 3, 8, 8))
    (se,) = se_modules(block)
    assert order.index("block.5") < order.index(se) < order.index("stochastic_depth")


def test_include_and_exclude_choose_blocks_by_path() -> None:
    model = timm.create_model("resnet10t")
    everything = {site.block for site in plan_se(model).sites}
    last = {"layer4.0"}
    included, excluded = plan_se(model, include="layer4.*"), plan_se(model, exclude=["layer4.*"])
    assert {site.block for site in included.sites} == last
    assert everything - last <= {skip.block for skip in included.skipped}
    assert {site.block for site in excluded.sites} == everything - last
    assert {skip.block for skip in excluded.skipped if skip.reason == "excluded"} == last
    both = plan_se(model, include=["layer3.*", "layer4.*"], exclude="*4.0")
    assert [site.block for site in both.sites] == ["layer3.0"]
