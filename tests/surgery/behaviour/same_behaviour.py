"""Whether a retrofitted network behaves as the original does, in all that can be seen from outside."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from networks import assert_untouched, random_states, randomised, same_tensors, se_modules, snapshot
from torch import Tensor, nn

from se_retrofit import add_se, has_se, remove_se

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Net(nn.Module):
    """A stem and two blocks of a kind."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = block()
        self.block2 = block()

    def forward(self, x, *args, **kwargs):
        x = self.block1(self.stem(x))
        for _ in range(3):
            if isinstance(x, dict):
                x = x["out"]
            elif isinstance(x, tuple):
                x = x[0]
        return self.block2(x, *args, **kwargs)


def check(
    model: nn.Module,
    calls: Sequence[Call] = (),
    *,
    sites: int | None = 2,
    sizes: Sequence[tuple[int, ...]] = ((2, 3, 16, 16), (1, 3, 9, 9), (3, 3, 11, 20)),
    twin: nn.Module | None = None,
    **options: Any,
) -> nn.Module:
    """Retrofit a network and hold it against the original: outputs, gradients, buffers, attributes, random states.

    Args:
        model: the network.
        calls: further calls, as arguments and keyword arguments behind the image.
        sites: how many SE modules it has to get; None for at least one.
        sizes: of the images.
        twin: another network like it, where it can't be copied and so is retrofitted in place.
        options: for ``add_se``.
    """
    torch.manual_seed(7)
    randomised(model).eval()
    before, attributes, states = snapshot(model), _attributes(model), list(random_states())
    options = {"example_inputs": torch.zeros(sizes[0]), **options}
    if twin is not None:
        retrofitted = add_se(model, 2, inplace=True, **options)
        assert list(random_states()) == states, "the random states moved"
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if "se_attention" not in k})
        model = twin.eval()
    else:
        retrofitted = add_se(model, 2, **options)
        assert_untouched(model, before)
        assert _attributes(model) == attributes, "planning changed what the model keeps in its attributes"
        assert list(random_states()) == states, "the random states moved"
    assert len(se_modules(retrofitted)) == sites if sites is not None else se_modules(retrofitted)
    for training in (False, True):
        for size in sizes:
            for args, kwargs in ((), {}), *calls:
                _compare(model, retrofitted, training, size, args, kwargs)
    x = torch.randn(sizes[0])
    with torch.no_grad():
        as_it_was = _tensors(retrofitted.eval()(x))
    live, seen = _copied(retrofitted).eval(), set()

    def halve(path: str, output: Tensor) -> Tensor:
        seen.add(path)
        return output * 0.5

    hooks = [
        se.register_forward_hook(lambda module, args, output, path=path: halve(path, output))
        for path, se in se_modules(live).items()
    ]
    with torch.no_grad():
        assert not same_tensors(_tensors(live(x)), as_it_was), "what SE returns goes nowhere"
    for hook in hooks:
        hook.remove()
    assert seen == set(se_modules(live)), "an SE module is not called"
    bare = remove_se(retrofitted, inplace=True)
    assert not has_se(bare)
    assert [type(m) for m in bare.modules()] == [type(m) for m in model.modules()]
    assert list(bare.state_dict()) == list(model.state_dict())
    return live


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except TypeError:  # it holds a lock
        return model


def _compare(
    model: nn.Module, retrofitted: nn.Module, training: bool, size: tuple[int, ...], args: Any, kwargs: Any
) -> None:
    where = f"training={training}, size={size}, args={args}, kwargs={kwargs}"
    results = []
    for network in (model, retrofitted):
        network = _copied(network).train(training)
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).requires_grad_(training)
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        given = copy.deepcopy((args, kwargs))
        output = network(x, *given[0], **given[1])
        tensors = _tensors(output)
        assert tensors
        assert all(t.isfinite().all() for t in tensors), "the comparison says nothing: the outputs are not finite"
        gradients = {}
        if training and any(t.requires_grad for t in tensors):
            sum(t.float().square().sum() for t in tensors if t.requires_grad).backward()
            gradients = {n: p.grad for n, p in network.named_parameters() if "se_attention" not in n}
            gradients["input"] = x.grad
        results.append(
            {
                "outputs": tensors,
                "the structure of the output": _structure(output),
                "gradients": gradients,
                "buffers": dict(network.named_buffers()),
                "attributes": _attributes(network),
                "arguments": _structure(given),
                "random states": list(random_states()),
            }
        )
    ours, theirs = results[1], results[0]
    for name, expected in theirs.items():
        assert _same(ours[name], expected), f"{name} differ: {where}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return type(value).__name__, {k: _structure(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_structure(v) for v in value]
    return value


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The plain data that modules keep in their attributes."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, SimpleNamespace):
                value = vars(value)
            hidden = name.startswith("_") or "se_attention" in path or name == "training"
            if not hidden and isinstance(value, (bool, int, float, str, list, tuple, dict)):
                found[f"{path}.{name}"] = copy.deepcopy(_structure(value))
    return found
