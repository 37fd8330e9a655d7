"""Plain chains: named after the unit that a network is made of; beside other blocks listed, and given SE where ``include`` names
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_function, randomised
from structure import conv, convs, module_of
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, roi_align

from se_retrofit import Plan, RetrofitError, add_se, has_se, plan_of, plan_se, remove_se

X = torch.randn(2, 3, 16, 16)
CHAIN, LONE = (
    "a plain chain beside other blocks: name it in include",
    "a convolution without a non-linearity: name it in include",
)
OUTPUT = "no learned layer takes its output: a prediction, or not used"
SAMPLING = "another value is sampled by its output: a prediction"


def body() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8))


def res_unet() -> dict[str, nn.Module]:
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    return {
        "stem": nn.Sequential(*convs(3, 8)),
        "encoder": nn.ModuleList([BasicBlock(8, 8), BasicBlock(8, 16, 2, down)]),
        "up": nn.ConvTranspose2d(16, 8, 2, 2),
        "decoder": nn.Sequential(nn.Sequential(*convs(16, 8, 8)), nn.Sequential(*convs(8, 8, 8))),
        "head": conv(8, 2),
    }


@module_of(res_unet)
def ResUNet(self, x: Tensor) -> Tensor:
    """A decoder of plain chains on an encoder of residual units."""
    first = self.encoder[0](self.stem(x))
    x = torch.cat([first, self.up(self.encoder[1](first))], 1)
    return torch.sigmoid(self.head(self.decoder(x)))


def detector() -> dict[str, nn.Module]:
    heads = {"scores": nn.Conv2d(8, 2, 3), "boxes": nn.Conv2d(8, 4, 3), "second": nn.Linear(8 * 9, 5)}
    levels = {"body": nn.Sequential(*body(), BasicBlock(8, 8)), "fpn": FeaturePyramidNetwork([8, 8], 8)}
    return {**levels, "head": nn.Sequential(*convs(8, 8)), **heads}


@module_of(detector)
def Detector(self, x: Tensor) -> list[Tensor]:
    """An FPN and a head that runs on its levels; boxes go into the second stage."""
    x = self.body[1](self.body[0](x))
    levels = self.fpn({"0": x, "1": self.body[2](F.max_pool2d(x, 2))})
    results = []
    for feature in levels.values():
        found = self.head(feature)
        boxes = F.relu(self.boxes(found)).permute(0, 2, 3, 1).reshape(-1, 4)[:3]
        pooled = roi_align(feature, torch.cat([boxes[:, :1] * 0, boxes], 1), 3)
        results += [self.scores(found).sigmoid(), self.second(pooled.flatten(1))]
    return results


def dilated() -> dict[str, nn.Module]:
    aspp = nn.ModuleList(nn.Sequential(conv(8, 8, dilation=rate), nn.ReLU()) for rate in (1, 2, 4))
    return {"body": body(), "aspp": aspp, "project": nn.Conv2d(32, 8, 1), "head": nn.Conv2d(8, 2, 1)}


@module_of(dilated)
def Dilated(self, x: Tensor) -> Tensor:
    """ASPP (Chen et al., arXiv:1706.05587), with its branch of the whole image."""
    x = self.body(x)
    whole = F.interpolate(x.mean((2, 3), keepdim=True), size=x.shape[2:])
    return self.head(self.project(torch.cat([*(branch(x) for branch in self.aspp), whole], 1)))


def tapped() -> dict[str, nn.Module]:
    features = nn.Sequential(*convs(3, 8, 8), nn.MaxPool2d(2), *convs(8, 16, 16))
    return {"features": features, "side": nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)])}


@module_of(tapped)
def Taps(self, x: Tensor) -> list[Tensor]:
    """An encoder of VGG layers that is run element by element, and whose features are tapped before the pools."""
    taps = []
    for layer in self.features:
        if isinstance(layer, nn.MaxPool2d):
            taps.append(x)
        x = layer(x)
    return [side(tap) for side, tap in zip(self.side, [*taps, x], strict=True)]


@module_of(
    lambda plain: {"plain": nn.Sequential(*convs(3, *([4] * plain))), "odd": conv(4, 4), "head": nn.Conv2d(4, 2, 1)}
)
def OddOne(self, x: Tensor) -> Tensor:
    """A network of plain chains with one residual unit."""
    x = self.plain(x)
    return self.head(x + torch.relu(self.odd(x)))


@module_of(lambda: {"encoder": nn.Sequential(*convs(3, 8), BasicBlock(8, 8)), "head": nn.Linear(8, 2)})
def Siamese(self, x: Tensor) -> Tensor:
    """Two pictures through one encoder: its stem runs twice, beside blocks in the same sequence."""
    first, second = self.encoder(x), self.encoder(x.flip(-1))
    return self.head((first - second).abs().mean((2, 3)))


@module_of(lambda: {"body": body(), "part": conv(4, 4), "large": conv(8, 8), "head": nn.Conv2d(8, 2, 1)})
def Rows(self, x: Tensor) -> Tensor:
    """A convolution whose output is written into a part of a map, which another one takes; and one for a case of its own."""
    x = self.body(x)
    out = x.clone()
    out[:, :4] = torch.relu(self.part(x[:, :4]))
    return self.head(self.large(out) if x.shape[-1] > 224 else out)


@module_of(
    lambda: {"body": body(), "motion": nn.Sequential(*convs(8, 8)), "flow": conv(8, 2), "head": nn.Conv2d(10, 2, 1)}
)
def Warped(self, x: Tensor) -> Tensor:
    """Features that are moved by a flow, which goes into the next layer as well (RAFT, Teed and Deng, arXiv:2003.12039)."""
    x = self.body(x)
    flow = self.flow(self.motion(x))
    moved = F.grid_sample(x, flow.permute(0, 2, 3, 1), align_corners=False)
    return self.head(torch.cat([moved, flow], 1))


@module_of(lambda: {"body": body(), "over": conv(1, 1, dims=1)})
def Pooled(self, x: Tensor) -> Tensor:
    return self.over(self.body(x).mean((2, 3))[:, None])


def u_net() -> dict[str, nn.Module]:
    pairs = {"d1": (3, 8), "d2": (8, 16), "u1": (16, 8)}
    units = {name: nn.Sequential(*convs(inputs, outputs, outputs)) for name, (inputs, outputs) in pairs.items()}
    return {**units, "pool": nn.MaxPool2d(2), "up": nn.ConvTranspose2d(16, 8, 2, 2), "head": nn.Conv2d(8, 2, 1)}


@module_of(u_net)
def UNet(self, x: Tensor) -> Tensor:
    first = self.d1(x)
    return self.head(self.u1(torch.cat([first, self.up(self.d2(self.pool(first)))], 1)))


def stages() -> nn.Module:
    """A VGG whose stages are sequences, with the pools at their ends or between them."""
    parts = [nn.Sequential(*convs(3, 8, 8), nn.MaxPool2d(2)), nn.Sequential(*convs(8, 16, 16, 16)), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(16 * 16, 10))


def streams() -> dict[str, nn.Module]:
    a, b = (nn.Sequential(*convs(3, 8), nn.MaxPool2d(2), *convs(8, 16)) for _ in range(2))
    return {"a": a, "b": b, "tail": nn.Conv2d(16, 2, 1)}


@module_of(streams)
def Streams(self, x: Tensor) -> Tensor:
    """Two networks side by side."""
    return self.tail(self.a(x) * self.b(x))


def denoiser() -> nn.Module:
    """One body is nearly all of it."""
    return nn.Sequential(nn.Sequential(*convs(3, 8, 8, 8, 8)), conv(8, 3))


def left(plan: Plan) -> dict[str, str]:
    return {skip.block: skip.reason for skip in plan.skipped}


@pytest.mark.parametrize(
    ("network", "include", "sites", "skipped"),
    [
        (
            ResUNet,
            "decoder.*",
            ["decoder.0", "decoder.0", "decoder.1", "decoder.1"],
            {"stem": CHAIN, "up": "it has no non-linearity, and is in no block", "head": OUTPUT},
        ),
        (ResUNet, ["stem", "encoder.*"], ["stem", "encoder.0", "encoder.1"], {"decoder.0": CHAIN}),
        (
            Detector,
            ["fpn*", "head"],
            ["fpn.layer_blocks.1", "fpn.layer_blocks.0", "head"],
            {"scores": OUTPUT, "boxes": SAMPLING, "body.1": "not included"},
        ),
        (Dilated, "aspp.*", ["aspp.0", "aspp.1", "aspp.2"], {"body.1": "not included"}),
        (Siamese, "encoder.0", ["encoder.0"], {"encoder.3": "not included"}),
        (Warped, "*", ["body.1", "motion"], {"flow": SAMPLING}),
        (Rows, "part", ["part"], {"large": "no recorded call runs it: give example_inputs with which one does"}),
        (UNet, "d1", ["d1", "d1"], {"d2": "not included"}),
        # a block is never a chain as well
        (ResUNet, "*", ["stem", "encoder.0", "encoder.1", *["decoder.0"] * 2, *["decoder.1"] * 2], {}),
    ],
)  # fmt: skip
def test_what_is_named_gets_se_and_what_is_not_is_listed(
    network: type[nn.Module], include: str | list[str], sites: list[str], skipped: dict[str, str]
) -> None:
    model = randomised(network()).eval()
    plan = plan_se(model, include=include)
    assert [site.block for site in plan.sites] == sites
    assert skipped.items() <= left(plan).items()
    assert left(plan).keys().isdisjoint(sites)
    assert_same_function(add_se(model, include=include), model, X)


@pytest.mark.parametrize(
    ("network", "sites", "beside"),
    [
        (ResUNet, ["encoder.0", "encoder.1"], {CHAIN: ["stem", "decoder.0", "decoder.1"]}),
        (
            Detector, ["body.1", "body.2"], {LONE: ["fpn.layer_blocks.1", "fpn.layer_blocks.0"], CHAIN: ["head"]},
        ),
        (Dilated, ["body.1"], {CHAIN: ["aspp.0", "aspp.1", "aspp.2"]}),
    ],
)  # fmt: skip
def test_without_include_the_blocks_alone_get_se(
    network: type[nn.Module], sites: list[str], beside: dict[str, list[str]]
) -> None:
    plan = plan_se(network().eval(), example_inputs=X)
    assert [site.block for site in plan.sites] == sites
    for reason, blocks in beside.items():
        assert [skip.block for skip in plan.skipped if skip.reason == reason] == blocks


def test_predictions_get_none_however_they_are_asked_for() -> None:
    plan = plan_se(Detector().eval(), include="*", example_inputs=X)
    assert not {"boxes", "scores"} & {site.block for site in plan.sites}
    with pytest.raises(RetrofitError, match=r"'boxes' matches none of the \d+ blocks found, which are body\.1"):
        plan_se(Detector().eval(), include="boxes", example_inputs=X)


def test_an_encoder_that_is_run_element_by_element_gets_its_se() -> None:
    model = randomised(Taps()).eval()
    plan = plan_se(model, example_inputs=X)
    assert [(site.path, site.block) for site in plan.sites] == [
        (f"features.{act}.se_attention", f"features.{conv}") for conv, act in ((0, 2), (3, 5), (7, 9), (10, 12))
    ]
    assert_same_function(add_se(model, example_inputs=X), model, X)


@pytest.mark.parametrize(("plain", "chains"), [(9, 0), (11, 11)])
def test_blocks_with_less_than_a_tenth_of_the_convolutions_are_odd_ones(plain: int, chains: int) -> None:
    plan = plan_se(OddOne(plain).eval(), example_inputs=X)
    assert [site.kind for site in plan.sites] == ["chain"] * chains + ["residual"]


def test_a_network_with_nothing_else_says_what_include_may_name() -> None:
    model = nn.Sequential(*convs(3, 8), nn.Conv2d(8, 2, 1)).eval()
    with pytest.raises(RetrofitError, match=r"no convolutional blocks.*include may name 0"):
        plan_se(model)
    assert [site.path for site in plan_se(model, include="0").sites] == ["2.se_attention"]


def test_the_plan_folds_what_is_skipped_by_reason() -> None:
    plan = plan_se(OddOne(8).eval(), example_inputs=X)
    assert f"plain.0, plain.3, plain.6 and 5 more: {CHAIN}" in str(plan)
    assert Plan.from_json(plan.to_json()).skipped == plan.skipped
    assert plan.skipped[1].convolutions == ("plain.3",)


@pytest.mark.parametrize(
    ("network", "listed"),
    [
        # colours that are shifted afterwards
        (lambda: nn.Sequential(*body(), nn.Conv2d(8, 3, 3), nn.Conv2d(3, 3, 1)), {"2": OUTPUT}),
        (Pooled, {"over": "it runs over what was pooled, not over space"}),
    ],
)
def test_other_convolutions_are_listed_with_the_reason(
    network: Callable[[], nn.Module], listed: dict[str, str]
) -> None:
    assert left(plan_se(network().eval())) == listed


# Units of several convolutions ---------------------------


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (UNet, ["d1"] * 2 + ["d2"] * 2 + ["u1"] * 2),
        (stages, ["0"] * 2 + ["1"] * 3),
        # where there is no other such unit, each convolution is on its own
        (denoiser, ["0.0", "0.3", "0.6", "0.9"]),
        # and where their size changes
        (Streams, ["a.0", "a.4", "b.0", "b.4"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_convolutions_of_a_repeated_unit_are_named_after_it(make: Callable[[], nn.Module], blocks: list[str]) -> None:
    assert [site.block for site in plan_se(make().eval(), example_inputs=X).sites] == blocks


def test_a_site_of_a_unit_may_be_taken_out_of_a_plan() -> None:
    model = UNet()
    plan = plan_se(model, example_inputs=X)
    fewer = replace(plan, sites=plan.sites[1:])
    retrofitted = add_se(model, plan=fewer)
    assert [site.path for site in plan_of(retrofitted).sites] == [site.path for site in plan.sites[1:]]
    assert_same_function(retrofitted.eval(), model.eval(), X)
    # and the plan that it has now is one by which it can be retrofitted again
    again = add_se(remove_se(retrofitted), plan=plan_of(retrofitted))
    assert has_se(again)
    assert list(again.state_dict()) == list(retrofitted.state_dict())
