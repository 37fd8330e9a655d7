"""Networks by name, small and with random norms; and what it takes to compare them bit for bit."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from se_retrofit.attention import Inserted
from se_retrofit.models import Base


@dataclass(frozen=True)
class Network:
    """A network that the contract is tested on, with the side of a small input that it takes."""

    name: str
    size: int

    def build(self, **kwargs: Any) -> nn.Module:
        """The network with 10 classes, random weights and random norms."""
        base = Base.of(self.name, num_classes=10, **kwargs)
        if self.name in ("torchvision/googlenet", "torchvision/inception_v3"):
            base.kwargs.update(aux_logits=True, init_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = _with_narrow_head(base) if self.name in _WIDE_HEADS else base.build()
            return randomised(model).eval()

    def input(self, batch: int = 2, wider: int = 0) -> Tensor:
        """A random batch, the same at every call."""
        return torch.randn(batch, 3, self.size, self.size + wider, generator=torch.Generator().manual_seed(3))


_NAMES = [
    "torchvision/resnet18", "torchvision/resnet50", "torchvision/vgg11", "torchvision/alexnet", "torchvision/densenet121",
    "torchvision/googlenet", "torchvision/inception_v3", "torchvision/squeezenet1_1", "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/regnet_x_400mf", "timm/test_resnet",
    "timm/test_convnext", "timm/resnet50", "timm/resnetv2_50", "timm/densenet121", "timm/mobilenetv2_100", "timm/convnext_atto",
    "timm/dla34", "timm/res2net50_26w_4s", "timm/hrnet_w18_small", "timm/cspdarknet53", "timm/vovnet39a", "timm/nf_resnet50",
    "timm/repvgg_b0", "timm/inception_resnet_v2", "timm/dpn68",
]  # fmt: skip
_LARGER = {"torchvision/alexnet": 64, "torchvision/inception_v3": 75, "timm/inception_resnet_v2": 75}
NETWORKS = {name: Network(name, _LARGER.get(name, 32)) for name in _NAMES}

_WIDE_HEADS = ("torchvision/vgg11", "torchvision/alexnet")

# Those in which there is nothing to retrofit, with a part of the reason that has to be given.
REFUSED = {
    "timm/test_efficientnet": "has channel attention already",
    "timm/test_vit": "no convolutional blocks",
}


# The paper's ablation.
PLACEMENTS = ("standard", "pre", "post", "identity", "3x3")


def _with_narrow_head(base: Base) -> nn.Module:
    """VGG's and AlexNet's heads hold nearly all of their parameters (up to 120 million): built on meta, and made narrow."""
    with torch.device("meta"):
        model = base.build()
    head = model.classifier
    assert isinstance(head, nn.Sequential)
    linears = [i for i, module in enumerate(head) if isinstance(module, nn.Linear)]
    width = head[linears[0]].in_features
    for i in linears:
        head[i] = nn.Linear(width, 10 if i == linears[-1] else 32)
        width = 32
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def randomised(model: nn.Module, seed: int = 11) -> nn.Module:
    """Random norms in place: a fresh norm is close to the identity, and many networks start with branches that give 0."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if "Norm" not in type(module).__name__ and "gamma" not in dict(module.named_parameters(recurse=False)):
                continue
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name in ("weight", "gamma", "running_var"):
                    uniform(tensor, 0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    uniform(tensor, -0.2, 0.2)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("skipinit_gain", "layer_scale", "gain"):
                uniform(parameter, 0.5, 1.5)
    return model


def narrow_resnet(**options: Any) -> nn.Module:
    """A ResNet of timm's with one block a stage, which costs next to nothing."""
    return randomised(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, channels=(8, 8, 16, 16), **options)).eval()


# Looking at models ---------------------------


def se_modules(model: nn.Module) -> dict[str, Inserted]:
    """The SE modules of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Inserted)}


def se_keys(model: nn.Module) -> set[str]:
    """The state-dict keys of the SE modules."""
    return {f"{path}.{key}" for path, se in se_modules(model).items() for key in se.state_dict()}


def randomise_se(model: nn.Module, seed: int = 5, std: float = 0.3) -> nn.Module:
    """Gates that are not 1, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for se in se_modules(model).values():
            for parameter in se.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def run(model: nn.Module, *inputs: Any, seed: int = 0, **kwargs: Any) -> list[Tensor]:
    """All tensors that a model returns, under a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = tree_map(lambda leaf: leaf, inputs)  # a forward may write into the list or dict that it is given
        return [leaf for leaf in tree_leaves(model(*own, **kwargs)) if isinstance(leaf, Tensor)]


def gradients(model: nn.Module, *inputs: Any, seed: int = 0) -> dict[str, Tensor | None]:
    """The gradients of all parameters by name, after one backward pass of a fixed random functional of the outputs."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(17)
    loss = sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in run(model, *inputs, seed=seed))
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same_tensors(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return len(a) == len(b) > 0 and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same_function(a: nn.Module, b: nn.Module, *inputs: Any) -> None:
    """Both give the same finite outputs, bit for bit."""
    with torch.no_grad():
        ours, theirs = run(a, *inputs), run(b, *inputs)
    assert all(y.isfinite().all() for y in theirs), "the comparison says nothing: the outputs are not finite"
    assert same_tensors(ours, theirs)


# What "untouched" means ---------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All there is to see of a model: structure, classes, flags, attributes, tensors (their identity and their values)."""
    return {
        "modules": [
            (path, id(module), type(module), module.training)
            for path, module in model.named_modules(remove_duplicate=False)
        ],
        "children": [[name for name, _ in module.named_children()] for module in model.modules()],
        "attributes": [{key: id(value) for key, value in vars(module).items()} for module in model.modules()],
        "hooks": [
            len(value) for module in model.modules() for key, value in vars(module).items() if key.endswith("_hooks")
        ],
        "tensors": [
            (name, id(t), t.data_ptr(), t._version, t.requires_grad, t.dtype, t.stride(), t.grad is None)
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        ],
        "values": {name: fingerprint(t) for name, t in model.state_dict().items()},
    }


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, type and a hash of the values, which costs less memory than a copy."""
    values = None
    if tensor.device.type != "meta":
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        values = hashlib.blake2b(raw.numpy().data, digest_size=16).digest()
    return tensor.shape, tensor.dtype, values


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is as it was when ``before`` was taken."""
    after = snapshot(model)
    for name, value in before.items():
        assert after[name] == value, name


def random_states() -> Iterator[Any]:
    """The global random states of torch, numpy and python."""
    yield torch.get_rng_state().numpy().tobytes()
    yield pickle.dumps(np.random.get_state())
    yield pickle.dumps(random.getstate())
