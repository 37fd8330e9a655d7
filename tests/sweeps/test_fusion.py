"""Fused networks of both libraries compute what they did, and go on to: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from se_retrofit import add_se, fuse_se, plan_fusion
from se_retrofit.models import Base
from se_retrofit.verify import redraw_vectors

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore")]

NETWORKS = {
    **dict.fromkeys(
        (
            "timm/resnet10t", "timm/resnet18", "timm/resnet26", "timm/resnet34", "timm/resnet50_gn",
            "timm/resnetblur18", "timm/resnext26ts", "timm/resnext50_32x4d", "timm/res2net50_14w_8s",
            "timm/res2next50", "timm/dla34", "timm/hrnet_w18_small", "timm/cspresnet50", "timm/gernet_s",
            "timm/regnetx_002", "torchvision/resnet18", "torchvision/resnext50_32x4d",
            "torchvision/wide_resnet50_2", "torchvision/regnet_x_400mf",
        ),
        (3, 64, 64),
    ),
    "torchvision/r3d_18": (3, 8, 32, 32),
}  # fmt: skip


def step(net: nn.Module, x: Tensor, rate: float) -> dict[str, Tensor]:
    net.zero_grad()
    output = net(x)
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    with torch.no_grad():  # a step as long as each tensor's own size allows: no network diverges
        for p in net.parameters():
            if p.grad is not None:
                p.sub_(p.grad * (rate * p.norm() / p.grad.norm().clamp(min=1e-12)))
    return gradients | {"": output.detach()} | {f"{k} (buffer)": v.clone() for k, v in net.named_buffers()}


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative, of the outputs, of all gradients together, and of all buffers together."""
    assert got.keys() == wanted.keys()
    worst = 0.0
    for kind in (lambda k: not k, lambda k: k and "(buffer)" not in k, lambda k: "(buffer)" in k):
        a, b = (
            torch.cat([v.double().flatten() for k, v in side.items() if kind(k)] or [torch.ones(1)])
            for side in (got, wanted)
        )
        worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_equals_unfused_before_and_after_twenty_steps(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.manual_seed(0)
    net = add_se(Base.of(name).build())
    redraw_vectors(net)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if ".se_attention" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert plan_fusion(net).fused
    x = torch.randn(4, *NETWORKS[name], dtype=dtype)
    layouts = [torch.contiguous_format] + [torch.channels_last] * (x.dim() == 4)
    for layout in layouts:
        for training in (True, False):
            one = copy.deepcopy(net).to(dtype).to(memory_format=layout).train(training)
            fused = fuse_se(one)
            given = x.to(memory_format=layout)
            found = difference(step(fused, given, 1e-3), step(one, given, 1e-3))
            print(f"{name} {dtype} {layout} {'train' if training else 'eval'}: {found:.1e}")
            assert found <= tolerance
            for _ in range(19):
                found = difference(step(fused, given, 1e-3), step(one, given, 1e-3))
            print(f"    after 20 steps: {found:.1e}")
            assert found <= tolerance
