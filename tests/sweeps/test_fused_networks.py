"""Fused networks of both libraries compute what they did, and go on to: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from se_retrofit import add_se, fuse_se
from se_retrofit.fusion import plan_fusion
from se_retrofit.models import Base
from se_retrofit.verify import redraw_vectors

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]

# ResNets with other stems, norms, groups, and splits; nested and parallel branches; RegNet; three dims
NETWORKS = {
    **dict.fromkeys(
        (
            "timm/resnet10t", "timm/resnet50_gn", "timm/resnetblur18", "timm/res2net50_14w_8s", "timm/dla34",
            "timm/hrnet_w18_small", "timm/cspresnet50", "torchvision/regnet_x_400mf",
        ),
        (3, 64, 64),
    ),
    "torchvision/r3d_18": (3, 8, 32, 32),
}  # fmt: skip
# frozen statistics, rounding and some steps of training on these alone; tests/fusion has them for each kind of norm
SMALL = ("timm/resnet10t", "timm/resnetblur18", "torchvision/regnet_x_400mf")


def forward_backward(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs, the gradients, and the buffers after a forward in the mode in which the network is."""
    net.zero_grad()
    output = net(x)
    nn.functional.cross_entropy(output, torch.arange(len(x))).backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return gradients | {"": output.detach()} | {f"{k} (buffer)": v.clone() for k, v in net.named_buffers()}


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative; the largest of those of the outputs, of all gradients together, and of all buffers together."""
    assert got.keys() == wanted.keys()
    worst = 0.0
    for kind in ("output", "gradient", "buffer"):
        keys = [
            k for k in wanted if kind == ("output" if not k else "buffer" if k.endswith("(buffer)") else "gradient")
        ]
        a, b = (torch.cat([side[k].double().flatten() for k in keys] or [torch.ones(1)]) for side in (got, wanted))
        worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


def retrofitted(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = add_se(Base.of(name).build())
    redraw_vectors(net)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if ".se_attention" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert plan_fusion(net).fused
    return net.double()


def rounded(net: nn.Module) -> nn.Module:
    """A copy whose parameters differ by a few roundings."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-15 * torch.randn_like(parameter))
    return other


def train(nets: list[nn.Module], x: Tensor, steps: int) -> None:
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        for _ in range(steps):
            forward_backward(net, x)
            optimizer.step()


def both(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """How far fused is from unfused in one step, and how far a few roundings of the weights lead from it.

    With random weights and frozen statistics the logits of a deep network are huge, and its gradients are what is left when
    almost equal numbers are subtracted: there no two orders of summation agree to 1e-12.
    """
    wanted = forward_backward(net, x)
    rounding = difference(forward_backward(rounded(net), x), wanted)
    return difference(forward_backward(fuse_se(net), x), wanted), rounding


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in NETWORKS), *((name, False) for name in SMALL)]
)
def test_fused_equals_unfused(name: str, training: bool) -> None:
    net = retrofitted(name).train(training)
    x = torch.randn(4, *NETWORKS[name], dtype=torch.float64)
    # tests/fusion has both layouts in both modes
    layout = torch.channels_last if training and x.dim() == 4 else torch.contiguous_format
    found, rounding = both(net.to(memory_format=layout), x.to(memory_format=layout))
    print(f"{name} float64 {layout} training={training}: {found:.1e}, rounding alone {rounding:.1e}", flush=True)
    assert found <= max(1e-12, 30 * rounding)


def smooth(net: nn.Module) -> nn.Module:
    """With SiLU for ReLU outside of SE: a value that rounding takes to the other side of a ReLU's kink changes the gradients by
    1e-3, fused or not, which hides everything else."""
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.ReLU) and ".se_attention" not in path:
            net.set_submodule(path, nn.SiLU())
    return net


@pytest.mark.parametrize("name", SMALL)
def test_in_float32_fused_is_as_near_to_float64_as_unfused(name: str) -> None:
    net = smooth(retrofitted(name)).train()
    x = torch.randn(4, *NETWORKS[name], dtype=torch.float64)
    for steps in (0, 20):
        train([net], x, steps)
        exact = forward_backward(copy.deepcopy(net), x)
        one = copy.deepcopy(net).float()
        fused = fuse_se(one)
        assert plan_fusion(fused).fused
        mine, others = (difference(forward_backward(m, x.float()), exact) for m in (fused, one))
        print(f"{name} float32 after {steps} steps: fused {mine:.1e}, unfused {others:.1e}", flush=True)
        assert mine <= max(1e-5, 3 * others)


@pytest.mark.parametrize("name", SMALL)
def test_under_autocast_fused_is_as_near_to_float64_as_unfused(name: str) -> None:
    net = retrofitted(name).train()
    x = torch.randn(4, *NETWORKS[name], dtype=torch.float64)
    exact = copy.deepcopy(net)(x)
    one = copy.deepcopy(net).float()
    fused = fuse_se(one)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, others = ((m(x.float()).double() - exact).norm() / exact.norm() for m in (fused, one))
    print(f"{name} bfloat16: fused {mine:.1e}, unfused {others:.1e}", flush=True)
    assert mine <= 3 * others
