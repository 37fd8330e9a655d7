"""SE is on what a block has newly computed, in networks of many fields."""

from __future__ import annotations

import pytest
import site_blocks as blocks
import timm
import torch
from networks import randomised, se_modules
from same_behaviour import Net, check
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, plan_se


def scaled(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What each SE module is given, by its path."""
    seen: dict[str, Tensor] = {}
    for path, se in se_modules(model).items():
        se.register_forward_pre_hook(lambda module, args, path=path: seen.update({path: args[0].clone()}))
    with torch.no_grad():
        model(*inputs)
    return seen


def test_a_diffusion_networks_blocks_have_se_at_the_end_of_the_branch_all_alike() -> None:
    model = randomised(blocks.UNet()).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    plan = plan_se(model, 2, example_inputs=(x, t))
    names = ["down", "middle", "up.0", "up.1"]
    assert [(site.block, site.kind, site.after) for site in plan.sites] == [(n, "residual", "conv2") for n in names]
    retrofitted = add_se(model, 2, example_inputs={"x": x, "t": t})
    with torch.no_grad():
        assert torch.equal(retrofitted(x, t), model(x, t))
        small = torch.randn(1, 3, 8, 12), torch.rand(1)
        assert torch.equal(retrofitted(*small), model(*small))
        a, temb = model.stem(x), model.time(t[:, None])
        expected = model.down(a, temb) - a
    torch.testing.assert_close(scaled(retrofitted, x, t)["down.se_attention"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("network", "after"), [(blocks.WaveNet, "mix"), (blocks.TasNet, None)])
def test_audio_networks_with_a_residual_and_a_skip_output(network: type[nn.Module], after: str | None) -> None:
    model = randomised(network()).eval()
    x = torch.randn(2, 1, 256)
    plan = plan_se(model, 2, example_inputs=x)
    assert [site.block for site in plan.sites] == [f"blocks.{i}" for i in range(len(model.blocks))]
    assert after is None or {site.after for site in plan.sites} == {after}
    retrofitted = add_se(model, 2, example_inputs=x)
    for length in (256, 128):
        y = torch.randn(3, 1, length)
        assert torch.equal(retrofitted(y), model(y))


def test_a_dual_path_block_has_se_on_what_goes_into_both_paths() -> None:
    model = blocks.DualPath()
    x = torch.zeros(2, 3, 12, 12)
    assert [(site.block, site.kind, site.after) for site in plan_se(model, 2, example_inputs=x).sites] == [
        ("blocks.0", "dense", "conv2"),
        ("blocks.1", "dense", "conv2"),
    ]
    check(model, sizes=((2, 3, 12, 12), (1, 3, 9, 14)))


@pytest.mark.parametrize("block", [blocks.Experts, blocks.CondConv, blocks.DynamicConv], ids=lambda cls: cls.__name__)
def test_a_mixture_of_experts_is_no_channel_attention(block: type[nn.Module]) -> None:
    check(Net(block))


def test_a_lone_stem_convolution_is_no_chain() -> None:
    with pytest.raises(RetrofitError, match="no convolutional blocks"):
        plan_se(timm.create_model("halonet_h1"))


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
def test_every_placement_works_with_an_in_place_relu_first_in_the_branch(placement: str) -> None:
    check(Net(blocks.PreActivated), placement=placement)


def test_complex_models_are_refused() -> None:
    with pytest.raises(RetrofitError, match="complex"):
        add_se(blocks.Complex(), example_inputs=torch.zeros(1, 3, 9, 9, dtype=torch.complex64))
