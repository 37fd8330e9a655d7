"""A retrofitted network goes wherever the original goes: wrappers, other formats, what the libraries offer for their models.

Copies, pickles, compilers and exporters: tests/attention/test_citizens.py.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from networks import (
    NETWORKS,
    assert_same_function,
    assert_untouched,
    gradients,
    narrow_resnet,
    randomise_se,
    randomised,
    run,
    same_tensors,
    se_modules,
    snapshot,
)
from sweeps import ON_CUDA, swept
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils._pytree import tree_leaves
from torchvision.models.resnet import Bottleneck, ResNet

from se_retrofit import RetrofitError, add_se, fuse_se, has_se, inspect_se, remove_se, save_retrofitted


def small() -> nn.Module:
    """A narrow ResNet with gates that are not 1."""
    torch.manual_seed(4)
    return randomise_se(add_se(narrow_resnet(), 4), std=0.1)


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def assert_same_training(a: nn.Module, b: nn.Module) -> None:
    """Their outputs and all gradients are equal in train mode; their running statistics need not be."""
    found, expected = gradients(a.train(), X), gradients(b.train(), X)
    for name, ours, theirs in zip(expected, found.values(), expected.values(), strict=True):
        assert torch.equal(ours, theirs), name  # type: ignore[arg-type]
    assert same_tensors(run(a, X), run(b, X))


def test_a_model_on_meta_is_retrofitted_there_and_filled_later() -> None:
    real = narrow_resnet()
    retrofitted = add_se(copy.deepcopy(real).to("meta"))
    assert {p.device.type for p in retrofitted.parameters()} == {"meta"}
    retrofitted.to_empty(device="cpu")
    retrofitted.load_state_dict(real.state_dict(), strict=False)
    for se in se_modules(retrofitted).values():
        se.reset_parameters()
    assert_same_function(retrofitted, real, X)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_retrofitted_in_inference_mode_trains(inplace: bool) -> None:
    model = narrow_resnet().train()
    with torch.inference_mode():
        fitted = add_se(model, 16, inplace=inplace)
        bare = remove_se(fitted)
    for network in (fitted, bare):
        network(X).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # vocoders use it all the same
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "changed", [nn.utils.weight_norm, partial(l1_unstructured, name="weight", amount=0.3), nn.utils.spectral_norm]
)
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


@pytest.mark.parametrize("device", [ON_CUDA])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/convnext_atto"])
def test_models_on_cuda(name: str, device: str) -> None:
    model, x = NETWORKS[name].build().to(device), NETWORKS[name].input().to(device)
    before = torch.cuda.get_rng_state()
    retrofitted = add_se(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert {p.device.type for p in retrofitted.parameters()} == {"cuda"}
    with torch.no_grad():
        assert same_tensors(run(retrofitted, x), run(model, x))


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
    assert_same_training(wrapped, model)
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
    found, expected = gradients(sharded, X), gradients(model, X)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-3, atol=1e-4)
    assert set(sharded.state_dict()) == set(model.state_dict())
    with pytest.raises(RetrofitError, match=r"undo that first|FSDP"):
        remove_se(sharded)
    for look in (inspect_se, lambda model: save_retrofitted(model, tmp_path / "saved")):
        with pytest.raises(RetrofitError, match=r"DTensor.*full_state_dict"):
            look(sharded)


def test_averaged_copies_follow() -> None:
    model = small()
    ema, averaged = ModelEmaV3(model, decay=0), torch.optim.swa_utils.AveragedModel(model)
    randomise_se(model, seed=6)
    ema.update(model)
    averaged.update_parameters(model)
    for copied in (ema.module, averaged.module):
        assert has_se(copied)
        assert_same_function(copied, model, X)


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
    plain = randomise_se(add_se(model), std=0.1)
    retrofitted = copy.deepcopy(plain)
    retrofitted.set_grad_checkpointing(True)
    assert_same_training(retrofitted, plain)
    model.set_grad_checkpointing(True)
    assert len(se_modules(add_se(model))) == len(se_modules(plain))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_memory_efficient_densenets(library: str) -> None:
    def build(efficient: bool) -> nn.Module:
        torch.manual_seed(0)
        if library == "timm":
            model = timm.create_model("densenet121", block_config=(2, 2), num_classes=4, memory_efficient=efficient)
        else:
            model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4, memory_efficient=efficient)
        return randomise_se(add_se(randomised(model).eval()))

    plain, efficient = build(False), build(True)
    assert len(se_modules(efficient)) == 4
    assert_same_function(efficient, plain, X)
    assert_same_training(efficient, plain)


@pytest.mark.parametrize("name", swept(["repvgg_a0"], ["mobileone_s0"]))
def test_timms_reparameterisation_after_the_retrofit(name: str) -> None:
    # in double precision: with random weights, values grow from layer to layer, and the gates amplify rounding errors
    model, x = randomised(timm.create_model(name, num_classes=4)).eval().double(), X.double()
    retrofitted = randomise_se(add_se(model), std=0.1)
    fused = reparameterize_model(retrofitted)
    assert len(se_modules(fused)) == len(se_modules(retrofitted)) > 0
    assert len(list(fused.modules())) < len(list(retrofitted.modules()))
    with torch.no_grad():
        y = retrofitted(x)
        torch.testing.assert_close(fused(x), y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
        assert not torch.allclose(model(x), y, rtol=1e-2)
        assert_same_function(pickle.loads(pickle.dumps(fused)), fused, x)


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
            found, expected = (tree_leaves(net.forward_intermediates(X)) for net in (retrofitted, model))
            assert same_tensors(found, expected)
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
    assert inspect.getsource(type(block)) == inspect.getsource(Bottleneck)
    assert inspect.signature(block.forward) == inspect.signature(Bottleneck(64, 16).forward)


# Blocks whose class says how it is copied and pickled ---------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.conv1(x).relu()))


def rebuilt(cls: type[Block], width: int, state: dict[str, Any]) -> Block:
    block = cls(width)
    block.load_state_dict(state)
    return block


class Reduced(Block):
    def __reduce__(self) -> Any:
        return rebuilt, (type(self), self.width, self.state_dict())


class ReducedByName(Block):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (ReducedByName, self.width, self.state_dict())


class Stateful(Block):
    def __getstate__(self) -> Any:
        return {"width": self.width, "tensors": self.state_dict()}

    def __setstate__(self, state: Any) -> None:
        self.__init__(state["width"])  # type: ignore[misc]
        self.load_state_dict(state["tensors"])


class ReducedWithState(Stateful):
    def __reduce__(self) -> Any:
        return type(self), (self.width,), self.__getstate__()


class NewWithArguments(Block):
    def __new__(cls, width: int) -> Any:
        return super().__new__(cls)

    def __getnewargs__(self) -> Any:
        return (self.width,)


class Parent(Block):
    """A child knows the block that it is in."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        vars(self.conv1)["parent"] = self


CLASSES = [Reduced, ReducedByName, Stateful, ReducedWithState, NewWithArguments, Parent]
WAYS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize(("inplace", "change"), [(False, nn.Identity()), (True, fuse_se)], ids=["copied", "fused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_block_is_copied_as_its_class_says_with_its_se(cls: Any, way: str, inplace: bool, change: Any) -> None:
    original = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), cls(8))).eval()
    before, keys = snapshot(original), list(original.state_dict())
    model = change(randomise_se(add_se(original, 2, inplace=inplace))).eval()  # the copy of a rebuilt one trains
    if not inplace:
        assert_untouched(original, before)
    again = WAYS[way](model).eval()
    assert type(again[1]) is type(model[1])
    assert list(again.state_dict()) == list(model.state_dict())
    assert same_tensors(list(again.state_dict().values()), list(model.state_dict().values()))
    assert not {id(t) for t in again.parameters()} & {id(t) for t in model.parameters()}
    assert_same_function(again, model, X)
    removed = remove_se(again)
    assert type(removed[1]) is cls
    assert list(removed.state_dict()) == keys
    if cls is Parent:
        assert again[1].conv1.parent is again[1]
