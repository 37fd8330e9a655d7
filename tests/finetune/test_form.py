"""What a network is in training: fused for torch.compile during a step and itself otherwise; with activations computed twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import digits, network, same, trained
from torch import nn

from se_retrofit import SEAttention, add_se, load_retrofitted
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


def test_activations_are_computed_once_more_by_the_networks_own_switch() -> None:
    saved, weights = Counter[bool](), {}
    for recomputed in (False, True):

        def pack(value: torch.Tensor, recomputed: bool = recomputed) -> torch.Tensor:
            saved[recomputed] += value.numel()
            return value

        torch.manual_seed(0)
        model = add_se(timm.create_model("test_resnet", num_classes=10, drop_rate=0.2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            trained(model, digits(32).train, recipe={"grad_checkpointing": recomputed})
        assert model.grad_checkpointing is False
        weights[recomputed] = dict(model.named_parameters())
    assert saved[True] < 0.7 * saved[False]
    assert same(weights[False], weights[True])


@pytest.mark.sweep
def test_a_compiled_run_trains_the_fused_network_and_keeps_the_own_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        result = trained(model, recipe=recipe, output_dir=tmp_path)
    assert seen == {True: True}  # evaluated is the network that is saved, not the fused one
    assert classes(model) == own
    assert list(model.state_dict()) == keys
    assert sorted(load_file(tmp_path / "last" / "weights.safetensors")) == sorted(keys)
    loaded = load_retrofitted(tmp_path / "best", base=network(se=False))
    assert all(type(m) is SEAttention for m in loaded.modules() if isinstance(m, SEAttention))
    # to rounding the run without it
    plain = trained(recipe={**recipe, "compile": False})
    assert result.history[1]["train_loss"] == pytest.approx(plain.history[1]["train_loss"], rel=1e-3)
    torch.compiler.reset()
