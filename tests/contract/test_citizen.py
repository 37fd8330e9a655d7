"""A retrofitted network goes wherever the original goes: files, other formats, wrappers, what the libraries offer."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from citizens import KINDS, X, model_and_input, small
from networks import (
    NETWORKS,
    assert_same_function,
    gradients,
    narrow_resnet,
    randomise_se,
    randomised,
    run,
    same_tensors,
    se_modules,
)
from safetensors.torch import load_model, save_model
from sweeps import swept
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torchvision.models.resnet import Bottleneck, ResNet

from se_retrofit import RetrofitError, add_se, has_se, inspect_se, remove_se, save_retrofitted

# Files ---------------------------


FRESH = """
import pathlib, sys, torch
for folder in pathlib.Path(sys.argv[1]).iterdir():
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = torch.load(folder / "model.pt", weights_only=False)
    assert torch.equal(model.eval()(expected["x"]), expected["eval"][0])
    torch.manual_seed(3)
    assert torch.equal(model.train()(expected["x"]), expected["train"][0])
    import se_retrofit
    assert se_retrofit.has_se(model)
    assert not se_retrofit.has_se(se_retrofit.remove_se(model))
"""


@pytest.mark.sweep
def test_a_whole_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """Without add_se or the building libraries being called there."""
    for name in ("torchvision/squeezenet1_1", "timm/convnext_atto"):
        model, x = model_and_input(name)
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        torch.save(model, folder / "model.pt")
        torch.save({"x": x, "eval": run(model, x), "train": run(model.train(), x, seed=3)}, folder / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path)], env=environment, check=True)


def test_safetensors_save_and_load(tmp_path: Path) -> None:
    model = small()
    save_model(model, str(tmp_path / "model.safetensors"))
    fresh = add_se(narrow_resnet(), 4)
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert_same_function(fresh, model, X)


def test_copies_of_copies_and_shallow_copies() -> None:
    model = small()
    twin = copy.deepcopy(copy.deepcopy(model))
    assert_same_function(twin, model, X)
    assert type(twin.layer1[0]) is type(model.layer1[0])
    assert_same_function(copy.copy(model), model, X)
    assert_same_function(copy.copy(model.layer2[0]), model.layer2[0], torch.randn(1, 8, 8, 8))


def test_the_source_of_a_blocks_class_is_found_as_before() -> None:
    model = narrow_resnet()
    assert inspect.getsource(type(add_se(model).layer1[0])) == inspect.getsource(type(model.layer1[0]))


# Types and formats ---------------------------


@pytest.mark.parametrize("name", KINDS)
def test_any_float_type_autocast_and_memory_format_give_the_same_outputs(name: str) -> None:
    original, x = NETWORKS[name].build(), NETWORKS[name].input()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = copy.deepcopy(original).to(dtype)
        retrofitted = add_se(model)
        assert {p.dtype for se in se_modules(retrofitted).values() for p in se.parameters()} == {dtype}
        with torch.no_grad():
            found, wanted = run(retrofitted, x.to(dtype)), run(model, x.to(dtype))
        # random weights may overflow float16
        assert same_tensors([y.isfinite() for y in found], [y.isfinite() for y in wanted])
        assert same_tensors([y.nan_to_num() for y in found], [y.nan_to_num() for y in wanted])
    model = original.to(memory_format=torch.channels_last)
    retrofitted = add_se(model)
    formats: dict[str, tuple[bool, bool]] = {}

    def note(se: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        formats[se.site.path] = tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], y))

    for module in se_modules(retrofitted).values():
        module.register_forward_hook(note)
    with torch.no_grad():
        x = x.to(memory_format=torch.channels_last)
        assert same_tensors(run(retrofitted, x), run(model, x))
        with torch.autocast("cpu", torch.bfloat16):
            assert same_tensors(run(retrofitted, x), run(model, x))
    assert len(formats) == len(se_modules(retrofitted))
    assert all(before == after for before, after in formats.values())


def test_a_model_on_meta_is_retrofitted_there_and_filled_later() -> None:
    real = narrow_resnet()
    with torch.device("meta"):
        model = type(real)(type(real.layer1[0]), [1, 1, 1, 1], num_classes=10, channels=(8, 8, 16, 16))
    retrofitted = add_se(model)
    assert {p.device.type for p in retrofitted.parameters()} == {"meta"}
    retrofitted.to_empty(device="cpu")
    retrofitted.load_state_dict(real.state_dict(), strict=False)
    for se in se_modules(retrofitted).values():
        se.reset_parameters()
    assert_same_function(retrofitted.eval(), real, X)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_retrofitted_in_inference_mode_trains(inplace: bool) -> None:
    model = narrow_resnet().train()
    with torch.inference_mode():
        fitted = add_se(model, 16, inplace=inplace)
        bare = remove_se(fitted)
    for network in (fitted, bare):
        network(X).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def _weight_norm(conv: nn.Conv2d) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's word against it; vocoders use it all the same
        nn.utils.weight_norm(conv)


def _pruned(conv: nn.Conv2d) -> None:
    l1_unstructured(conv, "weight", 0.3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("changed", [_weight_norm, _pruned, nn.utils.spectral_norm])
def test_weights_that_a_hook_computes_before_each_forward_are_copied(changed: Any, inplace: bool) -> None:
    def made() -> nn.Module:
        torch.manual_seed(3)
        model = narrow_resnet()
        for conv in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
            changed(conv)
        return model

    model, reference = made(), made()
    fitted = add_se(model, 16, inplace=inplace)
    assert_same_function(fitted, reference, X)
    assert inplace or not {p.data_ptr() for p in fitted.parameters()} & {p.data_ptr() for p in model.parameters()}
    fitted(X).sum().backward()
    assert all(parameter.grad is not None for parameter in fitted.parameters())
    assert_same_function(remove_se(fitted, inplace=inplace), reference, X)


def test_a_frozen_model_gets_gates_that_train() -> None:
    retrofitted = add_se(narrow_resnet().requires_grad_(False))
    found = gradients(retrofitted.train(), X)
    ours = {f"{path}.{name}" for path, se in se_modules(retrofitted).items() for name, _ in se.named_parameters()}
    assert {name for name, gradient in found.items() if gradient is not None} == ours


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/convnext_atto"])
def test_models_on_cuda(name: str) -> None:
    model, x = NETWORKS[name].build().cuda(), NETWORKS[name].input().cuda()
    before = torch.cuda.get_rng_state()
    retrofitted = add_se(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert {p.device.type for p in retrofitted.parameters()} == {"cuda"}
    with torch.no_grad():
        assert same_tensors(run(retrofitted, x), run(model, x))


def test_an_optimizer_stays_bound_to_a_model_retrofitted_in_place() -> None:
    model = narrow_resnet().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    retrofitted = add_se(model, inplace=True)
    run(retrofitted, X)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(retrofitted.conv1.weight, before["conv1.weight"])
    optimizer.add_param_group({"params": [p for se in se_modules(model).values() for p in se.parameters()]})


# Wrappers ---------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    model = small().train()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    found, expected = gradients(wrapped, X), gradients(model, X)
    for name, gradient in expected.items():
        assert torch.equal(found[f"module.{name}"], gradient), name  # type: ignore[arg-type]
    with pytest.raises(RetrofitError, match=r"DistributedDataParallel.*model\.module"):
        add_se(nn.parallel.DistributedDataParallel(remove_se(model)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
def test_fully_sharded_data_parallel(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small().train()
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in (sharded.layer1[0], sharded.layer2[0]):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    expected = gradients(model, X)
    generator = torch.Generator().manual_seed(17)
    y = run(sharded, X)[0]
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-3, atol=1e-4)
    assert set(sharded.state_dict()) == set(model.state_dict())
    with pytest.raises(RetrofitError, match=r"undo that first|FSDP"):
        remove_se(sharded)
    for look in (inspect_se, lambda model: save_retrofitted(model, tmp_path / "saved")):
        with pytest.raises(RetrofitError, match=r"DTensor.*full_state_dict"):
            look(sharded)


def test_an_ema_copy_follows() -> None:
    model = small().train()
    ema = ModelEmaV3(model, decay=0.5)
    assert has_se(ema.module)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name] + 0.5)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert has_se(averaged.module)


@pytest.mark.filterwarnings("ignore")
def test_data_parallel_and_functional_call() -> None:
    model = small()
    with torch.no_grad():
        assert torch.equal(nn.DataParallel(model)(X), model(X))
        state = {name: t + 0.01 for name, t in model.state_dict().items() if t.is_floating_point()}
        found = torch.func.functional_call(model, state, (X,))
        model.load_state_dict(state, strict=False)
        assert torch.equal(found, model(X))


# What the libraries offer for their models ---------------------------


@pytest.mark.parametrize("name", swept(["test_resnet", "test_convnext"], ["mobilenetv2_100", "regnetx_002"]))
def test_timms_gradient_checkpointing(name: str) -> None:
    model = randomised(timm.create_model(name, num_classes=4)).train()
    retrofitted = randomise_se(add_se(model), std=0.1)
    plain = copy.deepcopy(retrofitted)
    retrofitted.set_grad_checkpointing(True)
    found, expected = gradients(retrofitted, X), gradients(plain, X)
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter  # type: ignore[arg-type]
    model.set_grad_checkpointing(True)
    assert len(se_modules(add_se(model))) == len(se_modules(plain))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_memory_efficient_densenets(library: str) -> None:
    def build(efficient: bool) -> nn.Module:
        torch.manual_seed(0)
        if library == "timm":
            return timm.create_model("densenet121", block_config=(2, 2), num_classes=4, memory_efficient=efficient)
        return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4, memory_efficient=efficient)

    plain, efficient = randomised(build(False)).eval(), randomised(build(True)).eval()
    retrofitted = add_se(efficient)
    assert len(se_modules(retrofitted)) == 4
    ours, theirs = randomise_se(add_se(efficient)), randomise_se(add_se(plain))
    assert_same_function(ours, theirs, X)
    found, expected = gradients(retrofitted.train(), X), gradients(plain.train(), X)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())  # type: ignore[arg-type]
    assert same_tensors(run(ours.train(), X), run(theirs.train(), X))


@pytest.mark.parametrize("name", swept(["repvgg_a0"], ["mobileone_s0"]))
def test_timms_reparameterisation_after_the_retrofit(name: str) -> None:
    model = randomised(timm.create_model(name, num_classes=4)).eval()
    retrofitted = randomise_se(add_se(model), std=0.1)
    fused = reparameterize_model(retrofitted)
    assert len(se_modules(fused)) == len(se_modules(retrofitted)) > 0
    assert len(list(fused.modules())) < len(list(retrofitted.modules()))
    with torch.no_grad():
        y = retrofitted(X)
        torch.testing.assert_close(fused(X), y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
        assert not torch.allclose(model(X), y, rtol=1e-2)
        assert_same_function(pickle.loads(pickle.dumps(fused)), fused, X)


@pytest.mark.parametrize(
    "name", swept(["test_resnet", "test_convnext"], ["mobilenetv2_100", "densenet121", "regnetx_002"])
)
def test_timms_feature_api(name: str) -> None:
    model = randomised(timm.create_model(name, num_classes=4)).eval()
    retrofitted = add_se(model)
    with torch.no_grad():
        features = retrofitted.forward_features(X)
        assert torch.equal(features, model.forward_features(X))
        assert torch.equal(retrofitted.forward_head(features), model(X))
        if hasattr(model, "forward_intermediates"):
            final, steps = retrofitted.forward_intermediates(X)
            expected, expected_steps = model.forward_intermediates(X)
            assert same_tensors([final, *steps], [expected, *expected_steps])
        retrofitted.reset_classifier(7)
        assert retrofitted(X).shape == (2, 7)
        assert torch.equal(retrofitted.forward_features(X), features)
    assert retrofitted.get_classifier() is not None
    assert list(retrofitted.group_matcher()) == list(model.group_matcher())
    assert retrofitted.default_cfg == model.default_cfg


def test_hooks_registered_before_and_after_fire_once_with_the_blocks_own_values() -> None:
    model = remove_se(small())
    seen: list[str] = []
    model.layer1[0].register_forward_hook(lambda m, args, y: seen.append("before"))
    model.layer1[0].bn2.register_forward_pre_hook(lambda m, args: seen.append("child"))
    handle = model.layer1[0].register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    retrofitted = add_se(model, inplace=True)
    retrofitted.layer1[0].register_forward_hook(lambda m, args, y: seen.append("after"))
    retrofitted.layer1[0].se_attention.register_forward_hook(lambda m, args, y: seen.append("se"))
    retrofitted(X).sum().backward()
    assert seen == ["child", "se", "before", "after", "backward"]
    handle.remove()
    seen.clear()
    retrofitted(X).sum().backward()
    assert seen == ["child", "se", "before", "after"]


def test_blocks_stay_instances_of_their_classes_with_source_and_names() -> None:
    model = add_se(ResNet(Bottleneck, [2, 1, 1, 1]))
    block = model.layer1[0]
    assert isinstance(block, Bottleneck)
    assert type(model) is ResNet
    assert type(block).__name__ == "SEBottleneck"
    assert len({type(m) for m in model.modules() if isinstance(m, Bottleneck)}) == 1
    before, after = inspect.getsource(Bottleneck.forward), inspect.getsource(type(block).forward)
    assert after == before.replace("out = self.bn3(out)", "out = self.se_attention(self.bn3(out))") != before
    assert inspect.signature(block.forward) == inspect.signature(Bottleneck(64, 16).forward)
