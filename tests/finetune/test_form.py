"""What a network is during a training step: fused for torch.compile, with norms over all processes; and itself otherwise."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from se_retrofit import RetrofitError, SEAttention, add_se, has_se, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, NamedData, finetune
from se_retrofit.finetune.form import check_sync, training_form
from se_retrofit.fusion import FusedSEAttention

HERE = Path(__file__).parent
Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])  # BatchNorm2d, and timm's BatchNormAct2d
def test_norms_are_synchronized_in_a_step_alone(name: str, config: Config) -> None:
    model = add_se(timm.create_model(name, num_classes=10))
    own, keys = classes(model), list(model.state_dict())
    reference = copy.deepcopy(model)
    form = training_form(model, config(sync_batch_norm=True))
    assert classes(model) == own
    x = torch.randn(2, 3, 64, 64)
    with form:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        assert has_se(model)
        assert list(model.state_dict()) == keys
        torch.manual_seed(1)
        model.train()(x).sum().backward()  # one process: a synchronized norm is the norm itself
    assert classes(model) == own
    torch.manual_seed(1)
    reference.train()(x).sum().backward()
    for (path, value), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(value.grad, other.grad), path
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))


def test_the_form_ends_where_a_step_fails(network: Network, config: Config) -> None:
    model = network()
    own = classes(model)
    with pytest.raises(RuntimeError), training_form(model, config(sync_batch_norm=True)):
        model(torch.randn(1, 2, 8, 8))
    assert classes(model) == own


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_synchronized_norms_are_refused_where_they_cannot_be_had(
    network: Network, config: Config, digits: NamedData
) -> None:
    with pytest.raises(RetrofitError, match="and there is one process; start several with torchrun"):
        finetune(network(), digits.train, config=config(sync_batch_norm=True), quiet=True)
    recipe = config(sync_batch_norm=True)
    with pytest.raises(RetrofitError, match="these processes are on the CPU"):
        check_sync(network(), recipe, 2, "cpu")
    check_sync(network(), recipe, 2, "cuda")
    with pytest.raises(RetrofitError, match=r"batch norms of other classes: 1 \(OwnNorm\)"):
        check_sync(nn.Sequential(nn.Conv2d(3, 4, 3), OwnNorm(4)), recipe, 2, "cuda")
    with pytest.raises(RetrofitError, match="has no batch norm"):
        check_sync(nn.Linear(2, 2), recipe, 2, "cuda")
    with pytest.raises(RetrofitError, match="take one"):
        config(sync_batch_norm=True, freeze_bn=True)


@pytest.mark.sweep
def test_two_processes_on_the_cpu_are_told_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
         str(HERE / "run_tiny.py"), str(tmp_path), json.dumps({"sync_batch_norm": True})],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "these processes are on the CPU" in done.stderr


@pytest.mark.sweep
def test_a_compiled_run_trains_the_fused_network_and_keeps_the_own_one(
    network: Network, config: Config, digits: NamedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by a back end that changes nothing, so that a test takes no minute."""
    monkeypatch.setattr("se_retrofit.finetune.engine.BACKEND", "eager")
    torch.compiler.reset()
    seen: list[Any] = []
    fused = FusedSEAttention.forward

    def counted(self: Any, norm: nn.Module, u: torch.Tensor) -> torch.Tensor:
        seen.append(self.training)
        return fused(self, norm, u)

    model = network()
    own, keys = classes(model), list(model.state_dict())
    recipe = config(epochs=2, compile=True, ema_decay=0.9, checkpoint_minutes=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(FusedSEAttention, "forward", counted)
        result = finetune(model, digits.train, digits.val, config=recipe, output_dir=tmp_path, quiet=True)
    assert seen
    assert all(seen)  # evaluated is the network that is saved, not the fused one
    assert classes(model) == own
    assert list(model.state_dict()) == keys
    assert sorted(load_file(tmp_path / "last" / "weights.safetensors")) == sorted(keys)
    loaded = load_retrofitted(tmp_path / "best", base=network(se=False))
    assert all(type(m) is SEAttention for m in loaded.modules() if isinstance(m, SEAttention))
    # to rounding the run without it
    plain = finetune(network(), digits.train, digits.val, config=recipe.replace(compile=False), quiet=True)
    assert result.history[1]["train_loss"] == pytest.approx(plain.history[1]["train_loss"], rel=1e-3)
    torch.compiler.reset()


@pytest.mark.sweep
def test_a_compiled_run_is_resumed_to_the_same_weights(
    network: Network, config: Config, digits: NamedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_resume import Stopped, stop_after

    monkeypatch.setattr("se_retrofit.finetune.engine.BACKEND", "eager")
    recipe = config(epochs=2, compile=True, checkpoint_minutes=0.0)
    data = digits.train, digits.val
    whole = finetune(network(), *data, config=recipe, quiet=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        with pytest.raises(Stopped):
            finetune(network(), *data, config=recipe, output_dir=tmp_path, quiet=True)
    again = finetune(network(), *data, config=recipe, output_dir=tmp_path, resume=True, quiet=True)
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    torch.compiler.reset()
