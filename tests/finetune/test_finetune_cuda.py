"""What a step does to the network and on its device: fused for torch.compile, with activations computed twice, on a CUDA that
isn't there (see tests/contract/test_fake_cuda.py), and on a real one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import Mixup
from tiny import config, digits, network, same, trained
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import Subset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory

from se_retrofit import SEAttention, add_se, load_retrofitted
from se_retrofit.finetune import evaluate, learning
from se_retrofit.finetune.criteria import criterion_of, distillation_loss
from se_retrofit.finetune.data import Batch, collate, stream
from se_retrofit.finetune.engine import TrainingForm, placed
from se_retrofit.finetune.evaluation import answer, hits, losses_of
from se_retrofit.finetune.randomness import derive, seed_all
from se_retrofit.finetune.train import mixed
from se_retrofit.fusion import FusedSEAttention

CUDA = torch.device("cuda")
CLASSES = 10


def in_mode(mode: FakeTensorMode, module: nn.Module) -> nn.Module:
    """The module with fake tensors on the device in place of its own."""
    with mode:
        return module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA))


def batch_of(multi_label: bool = False, size: int = 5) -> Batch:
    targets = torch.zeros(size, CLASSES) if multi_label else torch.zeros(size, dtype=torch.long)
    return Batch(torch.randn(size, 3, 32, 32), targets, torch.ones(size, dtype=torch.bool), [])


def places(*tensors: Tensor) -> set[str]:
    return {str(tensor.device) for tensor in tensors}


@pytest.mark.parametrize(
    "fields",
    [
        {"label_smoothing": 0.1, "balance": "loss"},
        {"loss": "focal", "balance": "loss"},
        {"loss": "bce"},
        {"loss": "bce", "multi_label": True, "balance": "loss"},
        {"loss": "focal", "multi_label": True},
    ],
    ids=str,
)
def test_network_images_losses_and_metrics_are_on_the_device(fields: dict[str, Any]) -> None:
    mode, recipe = FakeTensorMode(), config(**fields)
    multi_label = recipe.multi_label
    data = TensorDataset(torch.zeros(CLASSES, 1), torch.eye(CLASSES) if multi_label else torch.arange(CLASSES))
    model, criterion = in_mode(mode, network()), criterion_of(recipe, None, data, CLASSES)
    if isinstance(criterion, nn.Module):
        criterion = in_mode(mode, criterion)
    with mode:
        images, labels = placed(batch_of(multi_label), CUDA)
        logits = model(images)
        found = [
            criterion(logits, labels),
            distillation_loss(logits, torch.randn_like(logits), 4.0, multi_label),
            losses_of(logits, labels, multi_label),
            hits(logits, labels, multi_label),
            *answer(logits, labels, multi_label),
        ]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert places(images, labels, logits, *model.state_dict().values(), *found) == {"cuda:0"}


@pytest.mark.parametrize(("size", "smoothing"), [(1, 0.0), (4, 0.1), (5, 0.0)])
def test_images_are_mixed_on_the_device(size: int, smoothing: float) -> None:
    mixup = Mixup(0.4, 0.4, label_smoothing=smoothing, num_classes=CLASSES)
    with FakeTensorMode():
        images, labels = mixed(mixup, *placed(batch_of(size=size), CUDA))
        loss = nn.CrossEntropyLoss()(torch.randn(size, CLASSES, device=CUDA), labels)
    assert images.shape == (size, 3, 32, 32)
    assert labels.shape == (size, CLASSES)
    assert places(images, labels, loss) == {"cuda:0"}


def test_data_on_the_device_is_neither_pinned_nor_loaded_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[str] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.device.type) or self)
    with FakeTensorMode():
        images, targets = torch.zeros(8, 3, 4, 4, device=CUDA), torch.zeros(8, dtype=torch.long, device=CUDA)
        for data in (TensorDataset(images, targets), Subset(TensorDataset(images, targets), range(4))):
            items = stream(data, name="data", train=False, batch_size=4, transform=None)
            assert items.loader.num_workers == 0
            batch = pin_memory(collate(items.loader.dataset.__getitems__([(0, 1, True), (0, 2, True)])))
            assert isinstance(batch, Batch)
            assert places(batch.images, batch.targets) == {"cuda:0"}
    assert set(pinned) == {"cpu"}  # which of them count


def test_seeds_reach_the_devices_in_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the others, torch would format the stack at every update and every image, to seed them once they are in use."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        seed_all(1, 2)
        assert seeds == [derive(1, 2)] * in_use
    with monkeypatch.context() as patch:
        patch.setattr("traceback.format_stack", lambda: pytest.fail("this takes a millisecond"))
        seed_all(1, 2)


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


# On a GPU


def needs_cuda(test: Any) -> Any:
    """They skip themselves where there is none."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_learns_in_every_precision(tmp_path: Path, precision: str, compiled: bool) -> None:
    recipe = {"cpu": False, "epochs": 12, "lr": 3e-3, "precision": precision, "compile": compiled}
    result = trained(recipe=recipe, output_dir=tmp_path)
    assert result.best_accuracy is not None
    assert result.best_accuracy > 0.5
    assert result.history[-1]["peak_memory_mb"] > 0
    assert all(p.is_cuda and p.dtype == torch.float32 for p in result.model.parameters())
    assert not any(key.startswith("_orig_mod") for key in load_file(tmp_path / "best" / "weights.safetensors"))
    loaded = load_retrofitted(tmp_path / "best", base=network(se=False))
    again = evaluate(loaded, digits().val, config=config(**recipe)).accuracy
    assert again == pytest.approx(result.best_accuracy, abs=0.02)


@needs_cuda
def test_auto_is_bf16_where_the_gpu_has_it_and_global_settings_are_given_back(capsys: Any) -> None:
    def settings() -> tuple[object, ...]:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        return torch.backends.cuda.matmul.fp32_precision, convolutions.fp32_precision, torch.backends.cudnn.benchmark

    before = settings()
    trained(recipe={"cpu": False}, quiet=False)
    assert settings() == before
    wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert f"cuda, {wanted};" in capsys.readouterr().out.replace("cuda:0", "cuda")


@needs_cuda
def test_the_optimizer_is_fused_and_images_are_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = network(), []
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    make, optimizers = learning.make_optimizer, []
    monkeypatch.setattr(learning, "make_optimizer", lambda *a, **k: optimizers.append(make(*a, **k)) or optimizers[-1])
    trained(model, recipe={"cpu": False})
    assert optimizers[0].defaults["fused"]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@needs_cuda
def test_the_scale_of_fp16_is_resumed(tmp_path: Path) -> None:
    recipe = {"cpu": False, "epochs": 2, "precision": "fp16"}
    trained(recipe=recipe, output_dir=tmp_path)
    state = json.loads((tmp_path / "last" / "training.json").read_text())
    assert dict(state["parts"]["scaler"]["dict"])["scale"] > 0
    state["progress"].update(finished=None, epoch=1, history=state["progress"]["history"][:2])
    (tmp_path / "last" / "training.json").write_text(json.dumps(state))
    again = trained(recipe=recipe, output_dir=tmp_path, resume=True)
    assert [row["epoch"] for row in again.history] == [0, 1, 2]
