"""What a network is in training: fused for torch.compile during a step and itself otherwise; with activations computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import classifier, network, trained
from torch import nn
from torch.utils.data import Subset

from se_retrofit import RetrofitError, SEAttention, add_se, load_retrofitted
from se_retrofit.finetune import NamedData
from se_retrofit.finetune.engine import TrainingForm
from se_retrofit.fusion import FusedSEAttention


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def test_the_form_ends_where_a_step_fails() -> None:
    model = network()
    own, form = classes(model), TrainingForm(model, True)
    assert classes(model) == own
    with form:
        assert FusedSEAttention in classes(model).values()
    with pytest.raises(RuntimeError), form:
        model(torch.randn(1, 2, 8, 8))
    assert classes(model) == own


def test_activations_are_computed_once_more_by_the_networks_own_switch(digits: NamedData) -> None:
    saved: dict[bool, int] = {}
    weights: dict[bool, Any] = {}
    for recomputed in (False, True):
        count = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += value.numel()
            return value

        torch.manual_seed(0)
        model = add_se(timm.create_model("test_resnet", num_classes=10, drop_rate=0.2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            trained(model, Subset(digits.train, range(32)), recipe={"grad_checkpointing": recomputed})
        assert model.grad_checkpointing is False
        saved[recomputed], weights[recomputed] = count, dict(model.named_parameters())
    assert saved[True] < 0.7 * saved[False]
    assert all(torch.equal(value, weights[False][name]) for name, value in weights[True].items())
    with pytest.raises(RetrofitError, match="Sequential has no set_grad_checkpointing"):
        trained(classifier(768, 10), digits.train, recipe={"grad_checkpointing": True})


@pytest.mark.sweep
def test_a_compiled_run_trains_the_fused_network_and_keeps_the_own_one(
    digits: NamedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by a back end that changes nothing, so that a test takes no minute."""
    monkeypatch.setattr("se_retrofit.finetune.engine.BACKEND", "eager")
    torch.compiler.reset()
    seen: dict[bool, bool] = {}  # a list that grows would be compiled anew for each length
    fused = FusedSEAttention.forward

    def noted(self: Any, norm: nn.Module, u: torch.Tensor) -> torch.Tensor:
        seen[self.training] = True
        return fused(self, norm, u)

    model = network()
    own, keys = classes(model), list(model.state_dict())
    recipe = {"epochs": 2, "compile": True, "ema_decay": 0.9, "checkpoint_minutes": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(FusedSEAttention, "forward", noted)
        result = trained(model, digits, recipe=recipe, output_dir=tmp_path)
    assert seen == {True: True}  # evaluated is the network that is saved, not the fused one
    assert classes(model) == own
    assert list(model.state_dict()) == keys
    assert sorted(load_file(tmp_path / "last" / "weights.safetensors")) == sorted(keys)
    loaded = load_retrofitted(tmp_path / "best", base=network(se=False))
    assert all(type(m) is SEAttention for m in loaded.modules() if isinstance(m, SEAttention))
    # to rounding the run without it
    plain = trained(network(), digits, recipe={**recipe, "compile": False})
    assert result.history[1]["train_loss"] == pytest.approx(plain.history[1]["train_loss"], rel=1e-3)
    torch.compiler.reset()
