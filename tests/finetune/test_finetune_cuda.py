"""What only a GPU can show. These tests skip themselves where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import config, network

from se_retrofit import load_retrofitted
from se_retrofit.finetune import NamedData, evaluate, finetune

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_learns_in_every_precision(digits: NamedData, tmp_path: Path, precision: str, compiled: bool) -> None:
    recipe = config(cpu=False, epochs=12, lr=3e-3, precision=precision, compile=compiled)
    result = finetune(network(), digits.train, digits.val, config=recipe, output_dir=tmp_path, quiet=True)
    assert result.best_accuracy is not None
    assert result.best_accuracy > 0.5
    assert result.history[-1]["peak_memory_mb"] > 0
    assert all(p.is_cuda and p.dtype == torch.float32 for p in result.model.parameters())
    assert not any(key.startswith("_orig_mod") for key in load_file(tmp_path / "best" / "weights.safetensors"))
    loaded = load_retrofitted(tmp_path / "best", base=network(se=False))
    assert evaluate(loaded, digits.val, config=recipe).accuracy == pytest.approx(result.best_accuracy, abs=0.02)


def test_auto_is_bf16_where_the_gpu_has_it(digits: NamedData, capsys: Any) -> None:
    finetune(network(), digits.train, config=config(cpu=False, epochs=1))
    wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert f"cuda, {wanted};" in capsys.readouterr().out.replace("cuda:0", "cuda")


def test_the_optimizer_is_fused_and_images_are_channels_last(
    digits: NamedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = network(), []
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    from se_retrofit.finetune import learning

    make, optimizers = learning.make_optimizer, []
    monkeypatch.setattr(learning, "make_optimizer", lambda *a, **k: optimizers.append(make(*a, **k)) or optimizers[-1])
    finetune(model, digits.train, config=config(cpu=False, epochs=1), quiet=True)
    assert optimizers[0].defaults["fused"]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_the_scale_of_fp16_is_resumed(digits: NamedData, tmp_path: Path) -> None:
    recipe = config(cpu=False, epochs=2, precision="fp16")
    finetune(network(), digits.train, digits.val, config=recipe, output_dir=tmp_path, quiet=True)
    state = json.loads((tmp_path / "last" / "training.json").read_text())
    assert dict(state["parts"]["scaler"]["dict"])["scale"] > 0
    state["progress"].update(finished=None, epoch=1, history=state["progress"]["history"][:2])
    (tmp_path / "last" / "training.json").write_text(json.dumps(state))
    again = finetune(network(), digits.train, digits.val, config=recipe, output_dir=tmp_path, resume=True, quiet=True)
    assert [row["epoch"] for row in again.history] == [0, 1, 2]


def test_global_settings_are_given_back(digits: NamedData) -> None:
    def settings() -> tuple[object, ...]:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        return torch.backends.cuda.matmul.fp32_precision, convolutions.fp32_precision, torch.backends.cudnn.benchmark

    before = settings()
    finetune(network(), digits.train, config=config(cpu=False, epochs=1), quiet=True)
    assert settings() == before
