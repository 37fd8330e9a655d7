"""A fused network computes what it did, to rounding; and fusing is undone without a trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from se_retrofit import (
    RetrofitError,
    add_se,
    excitations,
    fuse_se,
    load_retrofitted,
    plan_fusion,
    remove_se,
    save_retrofitted,
    unfuse_se,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Unit(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        return (out + x).relu()


class Net(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.stem, self.unit1, self.unit2 = nn.Conv2d(3, 8, 3), Unit(norm), Unit(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit2(self.unit1(self.stem(x))).mean((2, 3))


NORMS: dict[str, Any] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "untracked": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "plain": lambda: nn.BatchNorm2d(8, affine=False),
    "group": lambda: nn.GroupNorm(4, 8),
}


def retrofitted(norm: Any = NORMS["batch"], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = add_se(Net(norm), 2, example_inputs=torch.randn(2, 3, 12, 12), **options).double()
    with torch.no_grad():  # gates that are no identity, norms that are not fresh
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))


def agree(one: nn.Module, other: nn.Module, dtype: torch.dtype, layout: torch.memory_format, training: bool) -> None:
    tolerance = 1e-11 if dtype is torch.float64 else 2e-5
    one, other = (m.to(dtype).to(memory_format=layout).train(training) for m in (one, other))
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (one, other)]
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12, dtype=dtype).to(memory_format=layout)
        outputs = []
        for net, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(net(x))
            outputs[-1].square().sum().backward()
        assert close(*outputs, tolerance)
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert a.grad is not None, name
            assert b.grad is not None, name
            assert close(a.grad, b.grad, 100 * tolerance), name
        for optimizer in optimizers:
            optimizer.step()
        for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
            assert close(a.double(), b.double(), tolerance), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("norm", NORMS)
def test_fused_equals_unfused_over_training_steps(
    norm: str, dtype: torch.dtype, layout: torch.memory_format, training: bool
) -> None:
    net = retrofitted(NORMS[norm])
    fused = fuse_se(net)
    assert plan_fusion(fused).fused == ("unit1.se_attention", "unit2.se_attention")
    agree(fused, net, dtype, layout, training)


def test_under_autocast_statistics_are_float32() -> None:
    net = retrofitted().float().train()
    fused, x = fuse_se(net), torch.randn(4, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = net(x), fused(x)
    assert got.dtype is wanted.dtype
    assert close(got.float(), wanted.float(), 0.03)
    assert torch.allclose(fused.unit1.bn2.running_var, net.unit1.bn2.running_var, rtol=1e-3)


def test_keys_copies_and_pickles_stay_and_undoing_leaves_no_trace(tmp_path: Any) -> None:
    net = retrofitted().float().eval()
    fused, x = fuse_se(net), torch.randn(2, 3, 12, 12)
    assert list(fused.state_dict()) == list(net.state_dict())
    assert isinstance(fused.unit1, Unit)
    wanted = fused(x)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert plan_fusion(copied).fused
        assert copied(x).equal(wanted)
    assert unfuse_se(fused)(x).equal(net(x))
    assert type(unfuse_se(fused).unit1) is type(net.unit1)
    assert type(remove_se(fused).unit1) is Unit
    save_retrofitted(fused, tmp_path / "saved")
    loaded = load_retrofitted(tmp_path / "saved", base=remove_se(net)).eval()
    assert loaded(x).equal(net(x))


def test_a_hook_that_comes_later_is_called() -> None:
    fused, seen = fuse_se(retrofitted()), []
    fused.unit1.bn2.register_forward_hook(lambda *_: seen.append(1))
    fused(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    assert seen == [1]


def test_what_can_not_be_fused_is_listed_with_the_reason_and_the_model_stays() -> None:
    net = retrofitted()
    net.unit1.bn2.register_forward_hook(lambda *_: None)
    (skipped,) = plan_fusion(net).skipped
    assert (skipped.block, skipped.reason) == (
        "unit1.se_attention", "BatchNorm2d has hooks, which expect to see its output",
    )  # fmt: skip
    with pytest.raises(RetrofitError, match="call add_se first"):
        fuse_se(Net(NORMS["batch"]))
    with pytest.raises(RetrofitError, match="nothing to undo"):
        unfuse_se(net)


def test_second_derivatives_are_those_of_the_unfused_network() -> None:
    net = retrofitted().train()
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    second = []
    for model in (net, fuse_se(net)):
        weight = model.unit1.conv2.weight
        (grad,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert close(second[1], second[0], 1e-8)


def test_a_fused_network_compiles_as_one_graph() -> None:
    fused = fuse_se(retrofitted()).train()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    wanted = copy.deepcopy(fused)(x)
    assert close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), wanted, 1e-10)


def test_excitations_of_a_fused_network_are_those_of_the_unfused() -> None:
    net, x = retrofitted().eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    wanted, got = excitations(net, [x]).sites, excitations(fuse_se(net), [x]).sites
    assert [s.path for s in got] == [s.path for s in wanted]
    assert [(s.low, s.high) for s in got] == [(pytest.approx(s.low), pytest.approx(s.high)) for s in wanted]
