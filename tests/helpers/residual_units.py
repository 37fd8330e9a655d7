"""A second way to find the residual units of a network: watch the additions of one run.

It shares no code with the package, and looks at other things: no module, no torch.fx, only the operations that reach
PyTorch's dispatcher, and which tensors each of them took. A residual unit is an addition of two tensors one of which
(the skip) leads back, linearly and past two convolutions at most, to a value from which the other (the branch) was
computed with a convolution over space and a non-linearity, and everything in the branch is used in the branch only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from se_retrofit import SEAttention

ADDS = ("add", "add_", "sub")
NON_LINEAR = (
    "relu", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "leaky_relu", "elu", "mish", "prelu",
    "_prelu_kernel", "softplus", "clamp", "clamp_min", "softmax", "_softmax", "celu", "exp", "glu",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math", "_safe_softmax",
)  # fmt: skip
LINEAR = (
    "convolution", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "native_layer_norm", "native_group_norm", "mul", "div", "view", "_unsafe_view", "permute", "transpose", "reshape", "t",
    "expand", "unsqueeze", "squeeze", "clone", "contiguous", "alias", "slice", "split", "split_with_sizes", "select", "getitem",
    "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "constant_pad_nd", "cat", "detach",
    "_to_copy", "native_dropout", "pixel_unshuffle", "mm", "addmm", "upsample_nearest2d", "upsample_bilinear2d", "roll",
    "_adaptive_avg_pool2d", "unbind", "_reshape_alias",
)  # fmt: skip


@dataclass(eq=False)
class Node:
    """One tensor that was computed: from which others, by which operation."""

    index: int
    name: str
    shape: torch.Size
    parents: list[Node]
    spatial: bool = False  # a convolution over space
    se: SEAttention | None = None  # it was computed inside this SE module
    ancestors: int = 0
    users: list[Node] = field(default_factory=list)

    @property
    def bit(self) -> int:
        return 1 << self.index


@dataclass(eq=False)
class Unit:
    """A residual unit: its addition, the SE modules in its branch, and whether the branch has a gate of its own."""

    add: Node
    region: int
    ses: set[SEAttention]
    gated: bool


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.of: dict[int, Node] = {}
        self.kept: list[Tensor] = []  # ids are only unique while the tensors live
        self.inside: SEAttention | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        parents = list(dict.fromkeys(self.of[id(t)] for t in taken if id(t) in self.of))
        name = func.overloadpacket.__name__
        name = name if name == "add_" else name.removesuffix("_") or name
        spatial = name == "convolution" and _over_space(args)
        if parents:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.put(tensor, name, parents, spatial)
        return out

    def put(self, tensor: Tensor, name: str, parents: list[Node], spatial: bool = False) -> None:
        node = Node(len(self.nodes), name, tensor.shape, parents, spatial, self.inside)
        for parent in parents:
            node.ancestors |= parent.ancestors | parent.bit
            parent.users.append(node)
        self.nodes.append(node)
        self.of[id(tensor)] = node
        self.kept.append(tensor)


def _over_space(args: tuple[Any, ...]) -> bool:
    x, weight = args[0], args[1]
    return max(weight.shape[2:], default=1) > 1 and x.shape[2:].numel() > 1 and x.dim() > 3


def residual_units(model: nn.Module, inputs: tuple[Any, ...]) -> list[Unit]:
    """The innermost residual units that one run of a network in eval mode shows, in order."""
    watch = _Watch()

    def enter(module: nn.Module, args: Any) -> None:
        if isinstance(module, SEAttention):
            watch.inside = module

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module is watch.inside:
            watch.inside = None

    model.eval()
    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave), torch.no_grad(), watch:
        for tensor in tree_leaves(inputs):
            watch.put(tensor, "input", [])
        model(*inputs)
    units = [unit for node in watch.nodes if (unit := _unit(watch.nodes, node)) is not None]
    return [unit for unit in units if not any(other.add.bit & unit.region for other in units)]


def _unit(nodes: list[Node], add: Node) -> Unit | None:
    if add.name.rstrip("_") not in ("add",) or len(add.parents) != 2 or len(add.shape) < 3 or add.se is not None:
        return None
    first, second = add.parents
    for branch, skip in ((first, second), (second, first)):
        source = _lead_back(skip, branch)
        if source is None:
            continue
        region = [n for n in nodes[source.index + 1 : add.index] if n.bit & (branch.ancestors | branch.bit)]
        region = [n for n in region if n.ancestors & source.bit]
        own = [n for n in region if n.se is None]
        if not any(n.spatial for n in own) or not any(_non_linear(n) for n in own):
            continue
        bits = sum(n.bit for n in region)
        if any(not (user.bit & bits or user is add) for n in region for user in n.users if _matters(user, nodes)):
            continue
        ses = {n.se for n in region if n.se is not None}
        return Unit(add, bits, ses, any(_gate(n) for n in own))
    return None


def _matters(user: Node, nodes: list[Node]) -> bool:
    """Whether something is done with a tensor (reading its shape leaves views behind that nobody uses)."""
    return bool(user.users) or user is nodes[-1]


def _lead_back(skip: Node, branch: Node) -> Node | None:
    node, convs, acts = skip, 0, 0
    while not node.bit & branch.ancestors:
        parents = [p for p in node.parents if p.se is None]
        if len(parents) != 1:
            return None
        if node.name == "convolution":
            convs += 1
        elif node.name in NON_LINEAR and convs:
            acts += 1  # a projection of the pre-activated input
        elif node.name not in LINEAR:
            return None
        if convs > 2 or acts > 1:
            return None
        node = parents[0]
    return node


def _non_linear(node: Node) -> bool:
    gate = node.name == "mul" and len(node.parents) == 2 and all(p.se is None for p in node.parents)
    return node.name in NON_LINEAR or gate


def _gate(node: Node) -> bool:
    """A product of a feature map with something that has one value a channel and comes from the feature map."""
    if node.name != "mul" or len(node.parents) != 2:
        return False
    x, gate = sorted(node.parents, key=lambda n: -n.shape.numel())
    ones = [size for size in gate.shape[1:] if size == 1]
    return x.shape == node.shape and gate.shape != x.shape and len(ones) >= len(x.shape) - 2
