"""SE is in the right places: against networks that others built with SE, and against forwards written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from networks import NETWORKS, randomise_se, randomised, run, se_modules
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from se_retrofit import SEAttention, add_se, plan_se

# Native SE networks ---------------------------


def _load_native(retrofitted: nn.Module, native: nn.Module) -> None:
    """Copy every weight of timm's native SE network, whose SE is `se` (or `attn`) with the 1x1 convs fc1 and fc2, strictly."""
    state = {}
    for key, value in native.state_dict().items():
        parts = key.split(".")
        if parts[-2] in ("fc1", "fc2") and parts[-3] in ("se", "attn"):
            layer = "0" if parts[-2] == "fc1" else "2"
            key = ".".join([*parts[:-3], "se_attention", "fc", layer, parts[-1]])
            value = value.flatten(1) if value.dim() == 4 else value
        state[key] = value
    retrofitted.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("base", "native", "options"),
    [
        pytest.param("resnet50", "seresnet50", {}, marks=pytest.mark.sweep),
        ("resnet18", "seresnet18", {"min_hidden": 8}),
        ("resnext26ts", "seresnext26ts", {"min_hidden": 8, "placement": "3x3"}),  # timm has it inside the branch here
    ],
)
def test_a_retrofit_with_the_weights_of_timms_native_se_network_is_that_network(
    base: str, native: str, options: dict[str, Any]
) -> None:
    theirs = randomised(timm.create_model(native, num_classes=10)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "fc1." in name or "fc2." in name:
                parameter.normal_(std=0.5)
    ours = timm.create_model(base, num_classes=10).eval()
    ours = add_se(ours, reduction=16, gate="sigmoid", bias=True, **options)
    _load_native(ours, theirs)
    ours, theirs = ours.double(), theirs.double()  # so that rounding is small after the norms of small batches
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
    plan = plan_se(bare)
    assert len(blocks) == 8
    mnasnet = timm.create_model("mnasnet_100")
    for model, found in ((mnasnet, plan_se(mnasnet)), (bare, plan)):
        places = {(type(model.get_submodule(site.block)).__name__, site.after) for site in found.sites}
        assert places == {("DepthwiseSeparableConv", "bn1"), ("InvertedResidual", "bn2")}
    ours = add_se(bare, gate="sigmoid", bias=True, include=blocks)
    assert [path.rpartition(".")[0] for path in se_modules(ours)] == blocks
    for se, theirs in zip(se_modules(ours).values(), squeezes.values(), strict=True):
        assert se.channel == theirs.conv_expand.out_channels
        hidden = theirs.conv_reduce.out_channels  # a quarter of the block's input: not a ratio of ours
        se.fc[0], se.fc[2] = nn.Linear(se.channel, hidden), nn.Linear(hidden, se.channel)
        for layer, conv in ((se.fc[0], theirs.conv_reduce), (se.fc[2], theirs.conv_expand)):
            nn.init.normal_(conv.weight, std=0.5)
            layer.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x = torch.randn(2, 3, 64, 64)
    expected, found = run(native, x)[0], run(ours, x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_vovnet_has_its_se_where_timms_native_ese_vovnet_has_its_own() -> None:
    """Its blocks are one-shot aggregations: one SE each, behind the conv that fuses the concat."""
    native = timm.create_model("ese_vovnet39b")
    ours = plan_se(timm.create_model("vovnet39a"))
    expected = {path.rpartition(".")[0] for path, m in native.named_modules() if path.endswith(".attn")}
    # vovnet39a and ese_vovnet39b have other numbers of blocks in their stages, but their blocks are the same
    assert {path.split(".")[0] for path in expected} == {"stages"}
    blocks = {path for path, m in timm.create_model("vovnet39a").named_modules() if type(m).__name__ == "OsaBlock"}
    assert {site.block for site in ours.sites} == blocks
    assert {site.kind for site in ours.sites} == {"multi-branch"}
    assert {site.after for site in ours.sites} == {"conv_concat"}


# The five placements ---------------------------


def _bottleneck(block: Bottleneck, se: SEAttention, placement: str, x: Tensor) -> Tensor:
    """Figure 5 of the paper, on a bottleneck."""
    branch = se(x) if placement == "pre" else x
    branch = block.relu(block.bn1(block.conv1(branch)))
    branch = block.relu(block.bn2(block.conv2(branch)))
    if placement == "3x3":
        branch = se(branch)
    branch = block.bn3(block.conv3(branch))
    return _joined(block, se, placement, x, branch)


def _basic(block: BasicBlock, se: SEAttention, placement: str, x: Tensor) -> Tensor:
    """The same on a basic block. Its last conv is a 3x3 conv with no activation of its own before the add: the paper's
    "3x3" goes behind the spatial conv that has its norm and activation within the branch."""
    branch = se(x) if placement == "pre" else x
    branch = block.relu(block.bn1(block.conv1(branch)))
    if placement == "3x3":
        branch = se(branch)
    branch = block.bn2(block.conv2(branch))
    return _joined(block, se, placement, x, branch)


def _joined(block: BasicBlock | Bottleneck, se: SEAttention, placement: str, x: Tensor, branch: Tensor) -> Tensor:
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


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_each_placement_is_the_papers(kind: type[nn.Module], projected: bool, placement: str) -> None:
    block = _unit(kind, projected)
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    stem = nn.Conv2d(channels, channels, 1)
    example = torch.randn(2, channels, 8, 8)
    with torch.no_grad():
        retrofitted = add_se(nn.Sequential(stem, block), 2, placement=placement, example_inputs=example)[1]
        assert torch.equal(retrofitted(example), block(example))
        randomise_se(retrofitted)
        (se,) = se_modules(retrofitted).values()
        reference = _basic if kind is BasicBlock else _bottleneck
        for x in (example, torch.randn(3, channels, 12, 10)):
            expected = reference(block, se, placement, x)  # type: ignore[arg-type]
            torch.testing.assert_close(retrofitted(x), expected)
            others = {"standard", "pre", "post", "identity", "3x3"} - {placement}
            for other in others:
                width = {"pre": channels, "3x3": 8}.get(other, expected.shape[1])
                if width == se.channel:
                    assert not torch.allclose(reference(block, se, other, x), expected), other  # type: ignore[arg-type]


def test_auto_is_standard_for_residual_units() -> None:
    model = NETWORKS["torchvision/resnet18"].build()
    assert plan_se(model).sites == plan_se(model, placement="standard").sites


def test_other_placements_leave_other_kinds_of_block_out_and_say_so() -> None:
    model = NETWORKS["torchvision/shufflenet_v2_x0_5"].build()
    with pytest.raises(
        ValueError, match=r"placement 'pre' is for residual units, this block is of kind (dense|multi-branch)"
    ):
        plan_se(model, placement="pre")
    plan = plan_se(NETWORKS["timm/inception_resnet_v2"].build(), placement="post")
    assert {site.kind for site in plan.sites} == {"residual"}
    assert {skip.reason for skip in plan.skipped} == {
        f"placement 'post' is for residual units, this block is of kind {kind}" for kind in ("multi-branch", "chain")
    }


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        *(pytest.param(n, marks=pytest.mark.sweep) for n in ("timm/convnext_atto", "torchvision/mobilenet_v2")),
    ],
)
def test_each_placement_keeps_the_outputs(name: str, placement: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    plan = plan_se(model, placement=placement)
    auto = plan_se(model)
    retrofitted = add_se(model, placement=placement)
    with torch.no_grad():
        assert torch.equal(retrofitted(network.input()), model(network.input()))
        assert not torch.allclose(randomise_se(retrofitted)(network.input()), model(network.input()))
    # mobilenet_v2's blocks without a skip are no residual units
    assert {s.block for s in (*plan.sites, *plan.skipped)} == {s.block for s in (*auto.sites, *auto.skipped)}


# Which blocks, of which kind ---------------------------

# By the names of the classes that the libraries give their blocks.
BLOCKS = {
    "torchvision/resnet18": {"residual": "BasicBlock"},
    "torchvision/resnet50": {"residual": "Bottleneck"},
    "torchvision/densenet121": {"dense": "_DenseLayer"},
    "torchvision/googlenet": {"multi-branch": "Inception"},
    "torchvision/inception_v3": {"multi-branch": "InceptionA InceptionB InceptionC InceptionD InceptionE"},
    "torchvision/squeezenet1_1": {"multi-branch": "Fire"},
    "torchvision/mobilenet_v2": {"inverted": "InvertedResidual"},
    "torchvision/shufflenet_v2_x0_5": {"dense multi-branch": "InvertedResidual"},
    "torchvision/regnet_x_400mf": {"residual": "ResBottleneckBlock"},
    "torchvision/convnext_tiny": {"residual": "CNBlock"},
    "timm/resnet50": {"residual": "Bottleneck"},
    "timm/resnetv2_50": {"residual": "PreActBottleneck"},
    "timm/densenet121": {"dense": "DenseLayer"},
    "timm/mobilenetv2_100": {"inverted": "InvertedResidual DepthwiseSeparableConv"},
    "timm/convnext_atto": {"residual": "ConvNeXtBlock"},
    "timm/dla34": {"residual": "DlaBasic"},
    "timm/res2net50_26w_4s": {"residual": "Bottle2neck"},
    "timm/hrnet_w18_small": {"residual": "BasicBlock Bottleneck"},
    "timm/cspdarknet53": {"residual": "DarkBlock"},
    "timm/vovnet39a": {"multi-branch": "OsaBlock"},
    "timm/nf_resnet50": {"residual": "NormFreeBlock"},
    "timm/repvgg_b0": {"rep-sum": "RepVggBlock"},
    "timm/dpn68": {"dense": "DualPathBlock"},
}


# One for each kind; the sweeps take the others, too.
EVERY_TIME = (
    "torchvision/resnet18", "torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x0_5", "timm/mobilenetv2_100", "timm/repvgg_b0",
    "timm/convnext_atto",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.sweep) for name in BLOCKS]
)
def test_each_block_of_the_network_gets_one_se_and_nothing_else_does(name: str) -> None:
    model = NETWORKS[name].build()
    plan = plan_se(model)
    for kinds, classes in BLOCKS[name].items():
        blocks = {path for path, module in model.named_modules() if type(module).__name__ in classes.split()}
        assert not blocks & {skip.block for skip in plan.skipped}
        sites = [site.block for site in plan.sites if site.kind in kinds.split()]
        assert len(sites) == len(set(sites)) == len(plan.sites)
        assert set(sites) == blocks


def test_shufflenet_units_are_dense_at_stride_1_and_multi_branch_at_stride_2() -> None:
    model = NETWORKS["torchvision/shufflenet_v2_x0_5"].build()
    for site in plan_se(model).sites:
        block = model.get_submodule(site.block)
        assert site.kind == ("multi-branch" if block.stride == 2 else "dense")
        new = block.branch2[-2].num_features
        assert site.channels == (2 * new if block.stride == 2 else new)


@pytest.mark.sweep
def test_inception_resnet_v2_mixes_residual_and_multi_branch_blocks() -> None:
    model = NETWORKS["timm/inception_resnet_v2"].build()
    plan = plan_se(model)
    of_class = {path: type(module).__name__ for path, module in model.named_modules()}
    residual = {site.block for site in plan.sites if site.kind == "residual"}
    assert residual == {path for path, kind in of_class.items() if kind in ("Block35", "Block17", "Block8")}
    joined = {site.block for site in plan.sites if site.kind == "multi-branch"}
    assert joined == {
        path
        for path, kind in of_class.items()
        if kind in ("Mixed_5b", "Mixed_6a", "Mixed_7a", "Mixed5b", "Mixed6a", "Mixed7a")
    }


def test_xception_gets_se_in_its_modules_with_a_skip() -> None:
    model = NETWORKS["timm/xception41"].build()
    blocks = {path for path, m in model.named_modules() if type(m).__name__ == "XceptionModule" and not m.no_skip}
    assert {site.block for site in plan_se(model).sites} == blocks


@pytest.mark.parametrize("name", ["torchvision/vgg11", "torchvision/vgg16_bn", "torchvision/alexnet"])
def test_in_a_plain_chain_se_comes_after_the_nonlinearity_of_each_conv(name: str) -> None:
    network = NETWORKS[name]
    retrofitted = add_se(network.build())
    order = []
    for module in retrofitted.features.modules():
        if not isinstance(module, nn.Sequential) and type(module).__name__ != "TwiceSigmoid":
            module.register_forward_hook(lambda m, *_: order.append(type(m).__name__.removeprefix("SE") or "SE"))
    inside = {id(m) for se in se_modules(retrofitted).values() for m in se.fc.modules()}
    for module in retrofitted.modules():
        if id(module) in inside:
            module._forward_hooks.clear()
    with torch.no_grad():
        retrofitted(network.input())
    without_norms = [kind for kind in order if kind not in ("BatchNorm2d", "MaxPool2d")]
    convs = without_norms.count("Conv2d")
    assert convs == {"torchvision/vgg11": 8, "torchvision/vgg16_bn": 13, "torchvision/alexnet": 5}[name]
    assert sorted(without_norms[:3]) == ["Attention", "Conv2d", "ReLU"]
    for i in range(convs):
        conv, *rest = without_norms[3 * i : 3 * i + 3]
        assert conv == "Conv2d"
        assert set(rest) == {"ReLU", "Attention"}
    assert len(without_norms) == 3 * convs


def test_se_comes_before_stochastic_depth_and_layer_scale() -> None:
    """A gate behind the layer scale (1e-6 in a fresh ConvNeXt) would get next to no gradient."""
    retrofitted = add_se(NETWORKS["torchvision/convnext_tiny"].build())
    order = []
    block = retrofitted.features[1][0]
    for name, module in block.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    block.eval()(torch.randn(1, 96, 8, 8))
    (se,) = [name for name, module in block.named_modules() if isinstance(module, SEAttention)]
    assert order.index(se) > order.index("block.5")
    assert order.index(se) < order.index("stochastic_depth")


def test_include_and_exclude_choose_blocks_by_path() -> None:
    model = NETWORKS["torchvision/resnet18"].build()
    everything = {site.block for site in plan_se(model).sites}
    last = {"layer4.0", "layer4.1"}
    included, excluded = plan_se(model, include="layer4.*"), plan_se(model, exclude=["layer4.*"])
    assert {site.block for site in included.sites} == last
    assert {skip.block for skip in included.skipped} == {"conv1", *everything} - last
    assert {site.block for site in excluded.sites} == everything - last
    assert {skip.block for skip in excluded.skipped if skip.reason == "excluded"} == last
    both = add_se(model, include=["layer3.*", "layer4.*"], exclude="*.0")
    assert set(se_modules(both)) == {"layer3.1.se_attention", "layer4.1.se_attention"}
