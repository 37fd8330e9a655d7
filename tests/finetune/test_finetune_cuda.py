"""What a step does to the network and on its device: fused for torch.compile, with activations computed twice, on a CUDA that
isn't there (see tests/contract/test_fake_cuda.py), and on a real one."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from pictures import make_folder
from safetensors.torch import load_file
from sweeps import NEEDS_CUDA, ON_CUDA
from timm.data import Mixup
from tiny import config, digits, network, same, trained
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory

from se_retrofit import SEAttention, add_se, fold_se, load_retrofitted, plan_of, to_native
from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, evaluate, learning, load_data, train
from se_retrofit.finetune import pictures as pictures_of_runs
from se_retrofit.finetune.checkpoint import load_optimizer
from se_retrofit.finetune.criteria import criterion_of, distillation_loss
from se_retrofit.finetune.data import Batch, collate, stream
from se_retrofit.finetune.engine import TrainingForm, gpu_of, placed
from se_retrofit.finetune.evaluation import answer, hits, losses_of
from se_retrofit.finetune.randomness import derive, seed_all
from se_retrofit.finetune.train import mixed
from se_retrofit.fusion import FusedSEAttention
from se_retrofit.inspection import excitations
from se_retrofit.surgery.record.inputs import Inputs
from se_retrofit.verify import se_matters

CUDA = torch.device("cuda:0")
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
            items = stream(data, FinetuneConfig(batch_size=4), None, name="data")
            assert items.loader.num_workers == 0
            batch = pin_memory(collate(items.loader.dataset.__getitems__([(0, 1, True), (0, 2, True)])))
            assert isinstance(batch, Batch)
            assert places(batch.images, batch.targets) == {"cuda:0"}
    assert set(pinned) == {"cpu"}  # which of them count


def test_pictures_of_data_on_the_device_are_drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(pictures_of_runs, "drawn", lambda images, *_: seen.extend(images))
    monkeypatch.setattr(pictures_of_runs, "save_figure", lambda *_: None)
    row = {"epoch": 1, "hardest": [{"image": 0, "loss": 1.0, "answer": [0]}]}
    with FakeTensorMode():
        val = SimpleNamespace(items=lambda _: [(torch.zeros(3, 4, 4, device=CUDA), 0)], data=None)
        progress = SimpleNamespace(history=[row], best_epoch=1)
        run: Any = SimpleNamespace(progress=progress, val=val, model=nn.Identity(), config=config())
        pictures_of_runs.draw_hardest(run, Path("hardest.png"))
    assert places(*seen) == {"cpu"}


def test_a_network_on_a_gpu_is_trained_there_unless_processes_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        model = nn.Linear(2, 2, device="cuda:1")
    assert gpu_of(model, config(cpu=False)).idx == 1
    assert gpu_of(model, config(cpu=True)).idx is None
    assert gpu_of(network(), config(cpu=False)).idx is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gpu_of(model, config(cpu=False)).idx is None


def test_an_error_of_too_little_memory_says_what_needs_less() -> None:
    def full(facts: Facts) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        trained(callbacks=Callbacks(after_update=full))
    assert "smaller batch_size" in raised.value.__notes__[0]


class DefaultGPU(TorchFunctionMode):
    """As after ``torch.set_default_device("cuda")``: a generator on the CPU draws no tensor for the default device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return func(*args, **kwargs)


def test_a_default_device_changes_nothing(tmp_path: Path) -> None:
    data, bare = digits(32, 16), network(se=False).eval()
    recipe = {"trainable": "norms+head"}
    wanted = trained(network(), data.train, data.val, recipe)
    x = next(DataLoader(data.val, 4).__iter__())[0]
    with DefaultGPU():
        assert same(trained(network(), data.train, data.val, recipe).model.state_dict(), wanted.model.state_dict())
        assert se_matters(network().eval(), Inputs((x,))).finite
        assert len(load_data(str(make_folder(tmp_path) / "train")).val) == 4  # held out by chance
    for default in (DefaultGPU(), torch.device("meta")):
        with default:
            model = add_se(bare)
            assert len(fold_se(model, [x]).fold_report.folded) == len(plan_of(model).sites)
            assert to_native(model)(x).device.type == "cpu"
            assert excitations(model, [x]).sites[0].quartiles()["low"] == 1.0


def test_an_optimizers_state_from_another_machine_is_computed_with_as_on_this_one() -> None:
    weights = nn.Parameter(torch.ones(3, 2))
    weights.grad = torch.ones(3, 2)
    there, here = torch.optim.AdamW([weights]), torch.optim.AdamW([weights], fused=True)
    there.step()
    load_optimizer(here, there.state_dict())
    assert here.param_groups[0]["fused"]
    here.step()
    assert here.state[weights]["step"] == 2


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


class NoWaiting(TorchDispatchMode):
    """Refuses to read a value, but class numbers, which are on the CPU in a run on a GPU, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        reads = func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        if reads and args[0].dtype != torch.int64:
            raise AssertionError("on a GPU, this waits until all before it is done")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    if device == "cpu":
        with NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize(
    "fields", [{"label_smoothing": 0.1}, {"mixup": 0.2, "cutmix": 0.5}, {"loss": "focal"}], ids=str
)
def test_an_update_does_not_wait_for_the_gpu(
    fields: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = train.update

    def watched(run: Any, batches: Any) -> Any:
        with no_waiting(device) if run.progress.updates else contextlib.nullcontext():
            return update(run, batches)

    monkeypatch.setattr(train, "update", watched)
    recipe = {"cpu": device == "cpu", "optimizer_options": {"fused": True}, "grad_accum_steps": 2, **fields}
    assert trained(recipe=recipe).updates > 2


def needs_cuda(test: Any) -> Any:
    """They skip themselves where there is none."""
    for mark in NEEDS_CUDA:
        test = mark(test)
    return test


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
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
