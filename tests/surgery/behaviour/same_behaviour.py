"""Whether a retrofitted network behaves as the original does, in all that can be seen from outside."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from networks import assert_untouched, random_states, randomised, same_tensors, se_modules, snapshot
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from se_retrofit import add_se, has_se, remove_se

Call = tuple[tuple[Any, ...], dict[str, Any]]


def check(
    model: nn.Module,
    calls: Sequence[Call] = (),
    *,
    sites: int | None = 2,
    sizes: Sequence[tuple[int, ...]] = ((2, 3, 16, 16), (1, 3, 9, 9), (3, 3, 11, 20)),
    **options: Any,
) -> None:
    """Retrofit a network and hold it against the original: outputs, gradients, buffers, attributes, random states.

    Args:
        model: the network.
        calls: further calls, as arguments and keyword arguments behind the image.
        sites: how many SE modules it has to get; None for at least one.
        sizes: of the images; the first serves in train mode and for further calls.
        options: for ``add_se``.
    """
    torch.manual_seed(7)
    randomised(model).eval()
    before, attributes, states = snapshot(model), _attributes(model), list(random_states())
    options = {"example_inputs": torch.zeros(sizes[0]), **options}
    retrofitted = add_se(model, 2, **options)
    assert list(random_states()) == states, "the random states moved"
    assert_untouched(model, before)
    assert _attributes(model) == attributes, "planning changed what the model keeps in its attributes"
    assert len(se_modules(retrofitted)) == sites if sites is not None else se_modules(retrofitted)
    for size in sizes:
        _compare(model, retrofitted, False, size)
    _compare(model, retrofitted, True, sizes[0])
    for args, kwargs in calls:
        for training in (False, True):
            _compare(model, retrofitted, training, sizes[0], *args, **kwargs)
    _each_se_acts(copy.deepcopy(retrofitted).eval(), torch.randn(sizes[0]))
    bare = remove_se(retrofitted, inplace=True)
    assert not has_se(bare)
    assert [type(m) for m in bare.modules()] == [type(m) for m in model.modules()]
    assert list(bare.state_dict()) == list(model.state_dict())


def _each_se_acts(retrofitted: nn.Module, x: Tensor) -> None:
    """Each SE module is called, and what they return goes into the outputs."""
    with torch.no_grad():
        as_it_was, seen = _tensors(retrofitted(x)), set()
        for path, se in se_modules(retrofitted).items():
            se.register_forward_hook(lambda module, args, output, path=path: seen.add(path) or output * 0.5)
        assert not same_tensors(_tensors(retrofitted(x)), as_it_was), "what SE returns goes nowhere"
    assert seen == set(se_modules(retrofitted)), "an SE module is not called"


def _compare(
    model: nn.Module, retrofitted: nn.Module, training: bool, size: tuple[int, ...], *args: Any, **kwargs: Any
) -> None:
    theirs, ours = (_behaviour(m, training, size, *copy.deepcopy((args, kwargs))) for m in (model, retrofitted))
    for name, expected in theirs.items():
        assert _same(ours[name], expected), f"{name} differ: {training=}, {size=}, {args=}, {kwargs=}"


def _behaviour(model: nn.Module, training: bool, size: tuple[int, ...], args: Any, kwargs: Any) -> dict[str, Any]:
    network = copy.deepcopy(model).train(training)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).requires_grad_(training)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    output = network(x, *args, **kwargs)
    tensors = _tensors(output)
    assert tensors
    assert all(t.isfinite().all() for t in tensors), "the comparison says nothing: the outputs are not finite"
    trained = [t for t in tensors if t.requires_grad]
    if training and trained:
        sum(t.float().square().sum() for t in trained).backward()
    return {
        "outputs": output,
        "gradients": {n: p.grad for n, p in network.named_parameters() if "se_attention" not in n} | {"input": x.grad},
        "buffers": dict(network.named_buffers()),
        "attributes": _attributes(network),
        "arguments": (args, kwargs),
        "random states": list(random_states()),
    }


def _same(a: Any, b: Any) -> bool:
    """The same structures, with tensors that are equal bit for bit."""
    (ours, structure), (theirs, expected) = tree_flatten(a), tree_flatten(b)
    return structure == expected and all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The plain data that modules keep in their attributes."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, SimpleNamespace):
                value = vars(value)
            hidden = name.startswith("_") or "se_attention" in path or name == "training"
            if not hidden and isinstance(value, (bool, int, float, str, list, tuple, dict)):
                found[f"{path}.{name}"] = tree_map(lambda v: v.shape if isinstance(v, Tensor) else v, value)
    return found
