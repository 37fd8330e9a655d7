"""A fused network computes what it did, to rounding; and fusing is undone without a trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from sweeps import swept
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from se_retrofit import (
    RetrofitError,
    add_se,
    export,
    fold_se,
    fuse_se,
    inspect_se,
    load_retrofitted,
    remove_se,
    save_retrofitted,
    to_native,
)
from se_retrofit.fusion import plan_fusion, unfuse_se
from se_retrofit.inspection import excitations

FORMS = [
    (dtype, layout)
    for dtype in (torch.float64, torch.float32)
    for layout in (torch.contiguous_format, torch.channels_last)
]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "cumulative": partial(nn.BatchNorm2d, momentum=None),
    "untracked": partial(nn.BatchNorm2d, track_running_stats=False),
    "plain": partial(nn.BatchNorm2d, affine=False),
    "group": partial(nn.GroupNorm, 4),
    "one_group": timm.layers.GroupNorm1,
    "norm_act": partial(timm.layers.BatchNormAct2d, apply_act=False),
    "group_act": partial(timm.layers.GroupNormAct, group_size=2, apply_act=False),
    "frozen": torchvision.ops.FrozenBatchNorm2d,
}
X = torch.randn(4, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def network(norm: Callable[[int], nn.Module]) -> nn.Module:
    units = (BasicBlock(8, 8, norm_layer=norm) for _ in range(2))
    return nn.Sequential(nn.Conv2d(3, 8, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def retrofitted(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Any:
    torch.manual_seed(0)
    net = add_se(network(norm), 2, example_inputs=X.float()).double()
    with torch.no_grad():  # gates that are no identity, norms that are not fresh
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))


def agree(one: nn.Module, other: nn.Module, dtype: torch.dtype, layout: torch.memory_format, training: bool) -> None:
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    one, other = (m.to(dtype).to(memory_format=layout).train(training) for m in (one, other))
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (one, other)]
    for step in range(20):
        x = torch.randn(4, 3, 12, 12, dtype=dtype).to(memory_format=layout)
        outputs = []
        for net, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(net(x))
            outputs[-1].square().mean().backward()
        if step in (0, 19):
            assert close(*outputs, tolerance), step
            for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
                assert a.grad is not None, name
                assert b.grad is not None, name
                assert close(a.grad, b.grad, 10 * tolerance), (step, name)
            gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (one, other)]
            assert close(*gradients, tolerance)
            for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
                assert close(a.double(), b.double(), tolerance), (step, name)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", swept(FORMS[:1], FORMS[1:]), ids=lambda form: " ".join(map(str, form)))
@pytest.mark.parametrize("norm", NORMS)
def test_fused_equals_unfused_over_training_steps(
    norm: str, form: tuple[torch.dtype, torch.memory_format], training: bool
) -> None:
    net = retrofitted(NORMS[norm])
    fused = fuse_se(net)
    assert plan_fusion(fused).fused == ("1.se_attention", "2.se_attention")
    agree(fused, net, *form, training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_of_no_images_leaves_what_it_leaves_in_the_unfused_network(norm: str, training: bool) -> None:
    net = retrofitted(NORMS[norm]).train(training)
    fused, x = fuse_se(net), torch.zeros(0, 3, 12, 12, dtype=torch.float64)
    for one in (net, fused):
        with torch.no_grad():
            assert one(x).shape == (0, 8)
        one(x).sum().backward()
    for (name, a), b in zip(net.named_parameters(), fused.parameters(), strict=True):
        assert a.grad is None if b.grad is None else b.grad.equal(a.grad), name
    for (name, a), b in zip(net.named_buffers(), fused.buffers(), strict=True):
        assert b.equal(a), name


def test_under_autocast_statistics_are_float32() -> None:
    net = retrofitted().float().train()
    fused = fuse_se(net)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = net(X.float()), fused(X.float())
    assert got.dtype is wanted.dtype
    assert close(got.float(), wanted.float(), 0.03)
    assert torch.allclose(fused[1].bn2.running_var, net[1].bn2.running_var, rtol=1e-3)


def test_keys_copies_and_pickles_stay_and_undoing_leaves_no_trace(tmp_path: Any) -> None:
    net = retrofitted().eval()
    fused, wanted = fuse_se(net), net(X)
    assert list(fused.state_dict()) == list(net.state_dict())
    assert isinstance(fused[1], BasicBlock)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert plan_fusion(copied).fused
        assert copied(X).equal(fused(X))
    assert unfuse_se(fused)(X).equal(wanted)
    assert type(unfuse_se(fused)[1]) is type(net[1])
    assert type(remove_se(fused)[1]) is BasicBlock
    save_retrofitted(fused, tmp_path / "saved")
    assert load_retrofitted(tmp_path / "saved", base=remove_se(net)).eval()(X).equal(wanted)


def test_a_hook_that_comes_later_is_called_and_one_that_is_there_keeps_its_norm_as_it_is() -> None:
    fused, seen = fuse_se(retrofitted()), []
    fused[1].bn2.register_forward_hook(lambda *_: seen.append(1))
    fused(X)
    assert seen == [1]
    net = retrofitted()
    net[1].bn2.register_forward_hook(lambda *_: None)
    (skipped,) = plan_fusion(net).skipped
    assert skipped.block == "1.se_attention"
    assert skipped.reason == "BatchNorm2d has hooks, which expect to see its output"


def test_what_has_no_se_or_is_not_fused_is_refused() -> None:
    with pytest.raises(RetrofitError, match="call add_se first"):
        fuse_se(network(nn.BatchNorm2d))
    with pytest.raises(RetrofitError, match="nothing to undo"):
        unfuse_se(retrofitted())


def test_second_derivatives_are_those_of_the_unfused_network() -> None:
    net, second = retrofitted().train(), []
    for model in (net, fuse_se(net)):
        weight = model[1].conv2.weight
        (grad,) = torch.autograd.grad(model(X).square().sum(), weight, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert close(second[1], second[0], 1e-8)


@pytest.mark.sweep
@pytest.mark.xdist_group("compilers")
def test_a_fused_network_compiles_as_one_graph() -> None:
    fused = fuse_se(retrofitted()).train()
    wanted = copy.deepcopy(fused)(X)
    assert close(torch.compile(fused, fullgraph=True, backend="aot_eager")(X), wanted, 1e-10)


def test_excitations_of_a_fused_network_are_those_of_the_unfused() -> None:
    net = retrofitted().eval()
    wanted, got = excitations(net, [X]).sites, excitations(fuse_se(net), [X]).sites
    assert [s.path for s in got] == [s.path for s in wanted]
    assert [(s.low, s.high) for s in got] == [(pytest.approx(s.low), pytest.approx(s.high)) for s in wanted]


class Composite(nn.Module):
    """The norm is the last of what the branch calls."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


@pytest.mark.parametrize(
    "last",
    [
        lambda: timm.layers.ConvNormAct(8, 8, 3, apply_act=False),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        lambda: torchvision.ops.Conv2dNormActivation(8, 8, 3, activation_layer=None),
    ],
)
def test_a_norm_at_the_end_of_a_sequence_is_fused(last: Callable[[], nn.Module]) -> None:
    unit = Composite(nn.Sequential(timm.layers.ConvNormAct(8, 8, 3, act_layer=nn.ReLU), last()))
    net = add_se(nn.Sequential(nn.Conv2d(3, 8, 3), unit), 2, example_inputs=X.float())
    agree(fuse_se(net), net, *FORMS[0], training=True)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (timm.layers.LayerNorm2d, "LayerNorm2d has statistics of each position over the channels"),
        (timm.layers.BatchNormAct2d, "BatchNormAct2d ends in ReLU"),
        (nn.InstanceNorm2d, "InstanceNorm2d is not a norm that is known"),
        (nn.SyncBatchNorm, "SyncBatchNorm is not a norm that is known"),
    ],
)
def test_norms_for_which_the_algebra_does_not_hold_are_listed_with_the_reason(norm: Any, reason: str) -> None:
    net = add_se(network(norm), 2, example_inputs=X.float())
    assert all(skipped.reason.startswith(reason) for skipped in plan_fusion(net).skipped)
    assert len(plan_fusion(net).skipped) == 2
    with pytest.raises(RetrofitError, match=reason[:12]):
        fuse_se(net)


def test_the_norms_own_complaints_are_kept() -> None:
    fused = fuse_se(retrofitted()).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused[1].se_attention(fused[1].bn2, torch.randn(1, 8, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 4D input"):
        fused[1].se_attention(fused[1].bn2, torch.randn(2, 8, 4, dtype=torch.float64))


def test_what_needs_norm_and_se_apart_says_how_to_get_them_and_changes_nothing(tmp_path: Any) -> None:
    fused = fuse_se(retrofitted()).eval()
    before = copy.deepcopy(fused.state_dict())
    x = torch.randn(2, 3, 12, 12)
    for use in (
        lambda: fold_se(fused, [x], inplace=True),
        lambda: to_native(fused),
        lambda: export(fused, tmp_path / "net.py"),
        lambda: inspect_se(fused),
    ):
        with pytest.raises(RetrofitError, match="unfuse_se"):
            use()
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    assert not any(tmp_path.iterdir())
