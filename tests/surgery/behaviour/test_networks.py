"""Networks of many fields get SE in the blocks that they have, and behave as before."""

from __future__ import annotations

import copy

import network_blocks as networks
import pytest
import torch
from python_blocks import Block
from same_behaviour import Net, check
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from se_retrofit import RetrofitError, add_se, plan_se


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        (networks.C2f, "multi-branch"),
        (networks.Aggregated, "multi-branch"),
        (networks.SplitLater, "dense"),
        (networks.Frames, "residual"),
        (networks.Padded, "inverted"),
        (networks.GhostBottleneck, "residual"),
        (networks.Res2, "residual"),
        (networks.Shifted, "residual"),
        (networks.Mover, "residual"),
        (networks.Styled, "residual"),
    ],
)
def test_a_block_gets_one_se_of_its_kind(block: type[nn.Module], kind: str) -> None:
    model = Net(block)
    assert [site.kind for site in plan_se(model, 2, example_inputs=torch.zeros(2, 3, 16, 16)).sites] == [kind] * 2
    check(model)


@pytest.mark.parametrize(
    ("network", "sites"),
    [
        (networks.Perceptual, 2),
        (networks.Reader, 2),
        (networks.ConvLSTM, 1),
        (networks.Quantised, 2),
        (networks.Detector, 2),
    ],
)
def test_a_network_behaves_as_before(network: type[nn.Module], sites: int) -> None:
    check(network(), sites=sites, calls=[(((3,),), {})] if network is networks.Perceptual else ())


def test_where_the_batch_is_folded_into_the_channels_there_is_no_place() -> None:
    for placement in ("pre", "identity", "post"):
        check(Net(networks.Styled), placement=placement)
    with pytest.raises(RetrofitError, match="it is not known which dim"):
        add_se(Net(networks.Styled), 2, placement="3x3", example_inputs=torch.zeros(2, 3, 16, 16))


class Plain(Block):
    def forward(self, x):
        return x + self.bn2(self.conv2(self.branch(x)))


class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.flip(-1)) / 2


@pytest.mark.parametrize("what", ["block", "weight", "norm", "hook"])
def test_parametrized_and_hooked_blocks_go_on(what: str) -> None:
    def block() -> nn.Module:
        made = Plain()
        if what == "block":
            made.gain = nn.Parameter(torch.ones(8, 1, 1))
            parametrize.register_parametrization(made, "gain", nn.Softplus())
        elif what == "weight":
            parametrize.register_parametrization(made.conv2, "weight", Symmetric())
        elif what == "norm":
            parametrizations.spectral_norm(made.conv2)
        else:
            made.bn2.register_forward_hook(lambda module, args, output: output * 0.5)
            made.conv1.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
            made.register_forward_hook(lambda module, args, output: torch.relu(output))
        return made

    check(Net(block))


@pytest.mark.parametrize("what", ["lambda", "forward", "hook"])
def test_functions_on_instances_go_on_with_the_copys_modules(what: str) -> None:
    block = networks.SetForward() if what == "lambda" else Plain()
    runs: list[str] = []
    if what == "forward":
        inner = block.forward
        block.forward = lambda x: torch.relu(inner(x))  # type: ignore[method-assign]
    elif what == "hook":
        block.other = other = nn.Conv2d(8, 8, 1)
        block.register_forward_hook(lambda module, args, output: runs.append("") or output + other(args[0]))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block).eval()
    x = torch.randn(2, 3, 9, 9)
    retrofitted = add_se(model, 2, example_inputs=x)
    assert not runs, "a recording is seen by the hook's own list"
    expected = model(x)
    assert torch.equal(retrofitted(x), expected)
    se = next(module for path, module in retrofitted.named_modules() if path.endswith("se_attention"))
    called = []
    se.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(retrofitted(x), expected), "the copy computes with the original's weights"
    assert called


def test_the_copies_of_two_blocks_that_copy_themselves_are_two() -> None:
    model = Net(networks.Mover).eval()
    retrofitted = add_se(model, 2)
    again = copy.deepcopy(retrofitted)
    assert again.block1 is not again.block2
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(again(x), model(x))
