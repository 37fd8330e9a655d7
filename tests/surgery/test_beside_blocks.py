"""Plain chains beside other blocks: found, listed, and given SE where ``include`` names them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_function, randomised
from test_units import DoubleConv, convs
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, roi_align

from se_retrofit import Plan, RetrofitError, add_se, plan_se

X = torch.randn(2, 3, 32, 32)
CHAIN, LONE = (
    "a plain chain beside other blocks: name it in include",
    "a convolution without a non-linearity: name it in include",
)
OUTPUT = "no learned layer takes its output: a prediction, or not used"
SAMPLING = "another value is sampled by its output: a prediction"


class ResUNet(nn.Module):
    """A decoder of plain chains on an encoder of residual units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convs(3, 8))
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
        self.encoder = nn.ModuleList([BasicBlock(8, 8), BasicBlock(8, 16, 2, down)])
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.decoder = nn.ModuleList([DoubleConv(16, 8), DoubleConv(8, 8)])
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.encoder[0](self.stem(x))
        x = torch.cat([first, self.up(self.encoder[1](first))], 1)
        for layer in self.decoder:
            x = layer(x)
        return torch.sigmoid(self.head(x))


class Detector(nn.Module):
    """An FPN and a head that runs on its levels; boxes go into the second stage."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 1), BasicBlock(8, 8), BasicBlock(8, 8)])
        self.fpn = FeaturePyramidNetwork([8, 8], 8)
        self.head, self.scores, self.boxes = nn.Sequential(*convs(8, 8)), nn.Conv2d(8, 2, 3), nn.Conv2d(8, 4, 3)
        self.second = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body[1](self.body[0](x))
        levels = self.fpn({"0": x, "1": self.body[2](F.max_pool2d(x, 2))})
        results = []
        for feature in levels.values():
            found = self.head(feature)
            boxes = F.relu(self.boxes(found)).permute(0, 2, 3, 1).reshape(-1, 4)[:3]
            pooled = roi_align(feature, torch.cat([boxes[:, :1] * 0, boxes], 1), 3)
            results += [self.scores(found).sigmoid(), self.second(pooled.flatten(1))]
        return results


class Dilated(nn.Module):
    """ASPP (Chen et al., arXiv:1706.05587), with its branch of the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8))
        self.aspp = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=rate, dilation=rate), nn.ReLU()) for rate in (1, 2, 4)
        )
        self.project, self.head = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        whole = F.interpolate(x.mean((2, 3), keepdim=True), size=x.shape[2:])
        return self.head(self.project(torch.cat([*(branch(x) for branch in self.aspp), whole], 1)))


class Taps(nn.Module):
    """An encoder of VGG layers that is run element by element, and whose features are tapped before the pools."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*convs(3, 8, 8), nn.MaxPool2d(2), *convs(8, 16, 16))
        self.side = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(16, 4, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                taps.append(x)
            x = layer(x)
        return [side(tap) for side, tap in zip(self.side, [*taps, x], strict=True)]


class OddOne(nn.Module):
    """A network of plain chains with one residual unit."""

    def __init__(self, plain: int) -> None:
        super().__init__()
        self.plain, self.odd = nn.Sequential(*convs(3, *([4] * plain))), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x)
        return self.head(x + torch.relu(self.odd(x)))


class Siamese(nn.Module):
    """Two pictures through one encoder: its stem runs twice, beside blocks in the same sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*convs(3, 8), BasicBlock(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.encoder(x), self.encoder(x.flip(-1))
        return self.head((first - second).abs().mean((2, 3)))


class Rows(nn.Module):
    """A convolution whose output is written into a part of a map, which another one takes; and one for a case of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.part = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8)), nn.Conv2d(4, 4, 3, padding=1)
        self.large, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        out = x.clone()
        out[:, :4] = torch.relu(self.part(x[:, :4]))
        return self.head(self.large(out) if x.shape[-1] > 224 else out)


class Warped(nn.Module):
    """Features that are moved by a flow, which goes into the next layer as well (RAFT, Teed and Deng, arXiv:2003.12039)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.motion = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8)), nn.Sequential(*convs(8, 8))
        self.flow, self.head = nn.Conv2d(8, 2, 3, padding=1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        flow = self.flow(self.motion(x))
        moved = F.grid_sample(x, flow.permute(0, 2, 3, 1), align_corners=False)
        return self.head(torch.cat([moved, flow], 1))


def left(plan: Plan) -> dict[str, str]:
    return {skip.block: skip.reason for skip in plan.skipped}


@pytest.mark.parametrize(
    ("network", "include", "sites", "skipped"),
    [
        (
            ResUNet,
            "decoder.*",
            ["decoder.0.net", "decoder.0.net", "decoder.1.net", "decoder.1.net"],
            {"stem": CHAIN, "up": "it has no non-linearity, and is in no block", "head": OUTPUT},
        ),
        (ResUNet, ["stem", "encoder.*"], ["stem", "encoder.0", "encoder.1"], {"decoder.0.net": CHAIN}),
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
        # a block is never a chain as well
        (ResUNet, "*", ["stem", "encoder.0", "encoder.1", *["decoder.0.net"] * 2, *["decoder.1.net"] * 2], {}),
    ],
)  # fmt: skip
def test_what_is_named_gets_se_and_what_is_not_is_listed(
    network: type[nn.Module], include: str | list[str], sites: list[str], skipped: dict[str, str]
) -> None:
    model = randomised(network()).eval()
    plan = plan_se(model, include=include)
    assert [site.block for site in plan.sites] == sites
    assert skipped.items() <= left(plan).items()
    assert_same_function(add_se(model, include=include), model, X)


@pytest.mark.parametrize(
    ("network", "sites", "beside"),
    [
        (ResUNet, ["encoder.0", "encoder.1"], {CHAIN: ["stem", "decoder.0.net", "decoder.1.net"]}),
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
    with pytest.raises(RetrofitError, match="'boxes' matches none"):
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


def test_colours_that_are_shifted_afterwards_are_a_prediction_all_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8), nn.Conv2d(8, 3, 3), nn.Conv2d(3, 3, 1)).eval()
    assert left(plan_se(model)) == {"2": OUTPUT}


def test_a_convolution_over_what_was_pooled_is_listed_as_that() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.over = nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8)), nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.over(self.body(x).mean((2, 3))[:, None])

    assert left(plan_se(Pooled().eval())) == {"over": "it runs over what was pooled, not over space"}
