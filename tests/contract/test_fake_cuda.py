"""Networks on a CUDA that isn't there: a tensor on the wrong device shows without a GPU.

A ``FakeTensorMode`` has shapes, dtypes and devices but no values, and refuses an operation on tensors of two devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sweeps import swept
from timm.layers import SEModule
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torchvision.models import MobileNetV2

from se_retrofit import RetrofitError, add_se, fuse_se, inspect_se, plan_of, plan_se, remove_se, save_retrofitted
from se_retrofit.attention import ATTENTIONS
from se_retrofit.fusion import unfuse_se
from se_retrofit.inspection import GateLogger, excitations
from se_retrofit.saving import load_se, save_se

pytestmark = [
    # copy.deepcopy of a tensor asks for its address, of a fake one, too
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]

KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: timm.create_model("resnet10t"),
    "inverted": lambda: MobileNetV2(inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]]),
    "ConvNeXt": lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "dense": lambda: DenseNet(growth_rate=8, block_config=(2, 2)),
}
# whether it is called in the mode, and options
CASES = swept(
    [(True, {})],
    [(False, {}), (True, {"gate": "sigmoid"}), *((True, {"attention": a}) for a in (SEModule, *ATTENTIONS))],
)


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


def on_fake_cuda(kind: str, mode: FakeTensorMode) -> nn.Module:
    """The network with fake tensors of its shapes in place of its own. Some can't be built of them from the start: their
    constructors read values."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    network = KINDS[kind]()
    with mode:
        return network._apply(fake)


def runs_on_cuda(model: nn.Module, mode: FakeTensorMode) -> bool:
    """All that comes out of a forward is on the model's device. A backward needs a real one: autograd has a thread for each."""
    with mode:
        x = torch.randn(2, 3, 64, 64, device="cuda")
        y = model.train()(x)
        with torch.no_grad():
            z = model.eval()(x)
    return {str(t.device) for t in (y, z, *model.parameters(), *model.buffers())} == {"cuda:0"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", swept(["residual", "ConvNeXt"], ["inverted", "dense"]))
def test_the_surgery_does_on_cuda_what_it_does_elsewhere(
    kind: str, case: tuple[bool, dict[str, Any]], mode: FakeTensorMode
) -> None:
    (inside, options), network = case, on_fake_cuda(kind, mode)
    before, state = torch.get_rng_state(), network.state_dict()
    with mode if inside else contextlib.nullcontext():
        model = add_se(network, **options)
        new = model.state_dict().keys() - state.keys()
        assert len(new) >= len(plan_se(network).sites)
        assert all(value.fake_mode is mode for value in model.state_dict().values())
        assert [row.path for row in inspect_se(model).report().rows] == [site.path for site in plan_of(model).sites]
        assert runs_on_cuda(model, mode)
        remove_se(model, inplace=True)
        assert runs_on_cuda(model, mode)
        assert model.state_dict().keys() == state.keys()
        if kind == "residual" and not options:
            fused = fuse_se(add_se(network))
            assert runs_on_cuda(fused, mode)
            assert runs_on_cuda(unfuse_se(fused), mode)
    assert torch.equal(torch.get_rng_state(), before)


def test_gates_are_counted_on_the_device_from_the_start(mode: FakeTensorMode) -> None:
    model = add_se(on_fake_cuda("residual", mode))
    with mode, GateLogger(model) as gates:
        counts = [value for moments in gates._moments.values() for value in vars(moments).values()]
    assert {str(count.device) for count in counts if isinstance(count, Tensor)} == {"cuda:0"}


def test_what_needs_values_says_that_there_are_none(tmp_path: Path, mode: FakeTensorMode) -> None:
    model = add_se(on_fake_cuda("residual", mode))
    file = save_se(add_se(KINDS["residual"]()), tmp_path / "real.safetensors")
    calls: dict[Callable[[], Any], str] = {
        lambda: load_se(on_fake_cuda("residual", mode), file): "fake tensor",
        lambda: save_se(model, tmp_path / "se.safetensors"): "fake tensor",
        lambda: save_retrofitted(model, tmp_path / "saved"): r"conv1\.0\.weight is a fake tensor",
        lambda: excitations(model, [torch.randn(1, 3, 64, 64)]): r"conv1\.0\.weight is a fake tensor",
    }
    for call, fact in calls.items():
        with pytest.raises(RetrofitError, match=fact):
            call()
    assert list(tmp_path.iterdir()) == [file]
