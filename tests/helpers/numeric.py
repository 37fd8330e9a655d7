"""The promises of a retrofit, checked on real numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from networks import assert_untouched, same_tensors, se_modules, snapshot
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_retrofit import add_se, remove_se
from se_retrofit.verify import redraw_vectors

Run = Callable[[nn.Module], Any]  # calls a model on some inputs


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in what a model returns."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def outputs(model: nn.Module, run: Run) -> list[Tensor]:
    """What a model returns under a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(run(model))


def behaviour(model: nn.Module, run: Run, *, train: bool) -> dict[str, Tensor | None]:
    """What a copy of a model returns, the gradients of all its parameters, each output having a weight of its own, and its
    buffers afterwards."""
    model = copy.deepcopy(model).train(train)
    returned = outputs(model, run)
    total = torch.zeros(())
    for index, tensor in enumerate(returned):
        total = total + (tensor * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))).sum()
    total.backward()
    return {
        **{f"output {index}": tensor for index, tensor in enumerate(returned)},
        **{f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()},
        **{f"buffer {name}": buffer for name, buffer in model.named_buffers()},
    }


def assert_same_behaviour(original: nn.Module, retrofitted: nn.Module, run: Run, *, train: bool) -> None:
    """All that the original shows is the same bit for bit, and a gradient reaches each module that was inserted."""
    wanted, found = (behaviour(model, run, train=train) for model in (original, retrofitted))
    for name, value in wanted.items():
        other = found.pop(name)
        if value is None:
            assert other is None, f"there is a {name}, as there was none"
        else:
            assert other.dtype == value.dtype, name
            undefined = name.startswith("buffer") and bool(value.isnan().any())
            assert other.equal(value) or undefined, f"the {name} differs where train is {train}"
    assert not any(name.startswith("output") for name in found), "there are more outputs"
    for path in se_modules(retrofitted):
        gradients = [value for name, value in found.items() if name.startswith(f"gradient of {path}.")]
        assert any(gradient is not None and gradient.any() for gradient in gradients), f"no gradient reaches {path}"


def check_promises(model: nn.Module, run: Run, train_run: Run | None = None, **options: Any) -> nn.Module:
    """Retrofit a model and assert, on real numbers, what ``add_se`` promises; returns the retrofitted model.

    Args:
        model: on the CPU, freshly built.
        run: calls a model in eval mode.
        train_run: calls it in train mode, where that takes something else (detection models take targets).
        options: for ``add_se``.
    """
    redraw_vectors(model)
    before = snapshot(model)
    retrofitted = add_se(model, **options)
    assert_untouched(model, before)
    assert se_modules(retrofitted), "no SE went in"
    keys = list(model.state_dict())
    assert [key for key in retrofitted.state_dict() if "se_attention" not in key] == keys

    restored = remove_se(retrofitted)
    assert [(p, type(m)) for p, m in restored.named_modules()] == [(p, type(m)) for p, m in model.named_modules()]
    assert list(restored.state_dict()) == keys

    with torch.no_grad():
        wanted, found, again = (outputs(net.eval(), run) for net in (model, retrofitted, restored))
    assert all(t.isfinite().all() for t in wanted), "the original's outputs are not finite"
    assert same_tensors(found, wanted), "outputs differ in eval mode"
    assert same_tensors(again, wanted), "outputs differ after remove_se"
    assert_same_behaviour(model, retrofitted, train_run or run, train=True)
    return retrofitted
