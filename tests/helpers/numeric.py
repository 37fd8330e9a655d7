"""The promises of a retrofit, checked on real numbers: what the numeric sweep and the tests of other libraries share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from networks import assert_untouched, se_modules, snapshot
from torch import Tensor, nn

from se_retrofit import add_se, remove_se
from se_retrofit.verify import redraw_vectors

Run = Callable[[nn.Module], Any]  # calls a model on some inputs


def tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a model returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def loss(output: Any) -> Tensor:
    """A number that depends on every output, each with a weight of its own."""
    total = torch.zeros(())
    for index, tensor in enumerate(tensors(output)):
        weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
        total = total + (tensor * weights).sum()
    return total


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
    keys = model.state_dict().keys()
    assert [k for k in retrofitted.state_dict() if k in keys] == list(keys), "an original key is missing"
    assert all("se_attention" in key for key in retrofitted.state_dict().keys() - keys)

    wanted = _outputs(model, run)
    assert wanted, "the model returns nothing that could be compared"
    assert all(t.isfinite().all() for t in wanted), "the original's outputs are not finite"
    assert _equal(wanted, _outputs(retrofitted, run)), "outputs differ in eval mode"
    _equal_training(model, retrofitted, train_run or run)

    restored = remove_se(retrofitted)
    assert [(p, type(m)) for p, m in restored.named_modules()] == [(p, type(m)) for p, m in model.named_modules()]
    assert list(restored.state_dict()) == list(keys)
    assert _equal(wanted, _outputs(restored, run)), "outputs differ after remove_se"
    return retrofitted


def _outputs(model: nn.Module, run: Run) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(_run(model.eval(), run)))


def _equal_training(model: nn.Module, retrofitted: nn.Module, run: Run) -> None:
    results = []
    for net in (model, retrofitted):
        net = copy.deepcopy(net).train()
        output = _run(net, run)
        loss(output).backward()
        results.append((net, list(tensors(output))))
    (original, wanted), (other, got) = results
    assert _equal(wanted, got), "outputs differ in train mode"
    after = dict(other.named_parameters())
    for name, parameter in original.named_parameters():
        if parameter.grad is None:
            assert after[name].grad is None, f"{name} has a gradient that it had not"
        else:
            assert parameter.grad.equal(after[name].grad), f"the gradient of {name} differs"
    buffers = dict(other.named_buffers())
    for name, buffer in original.named_buffers():
        assert buffer.equal(buffers[name]) or buffer.isnan().any(), f"the buffer {name} moved differently"
    for path in se_modules(retrofitted):
        gradient = after[f"{path}.fc.2.weight"].grad
        assert gradient is not None, f"no gradient reaches {path}"
        assert gradient.abs().max() > 0, f"the gradient that reaches {path} is zero"


def _equal(wanted: list[Tensor], got: list[Tensor]) -> bool:
    return len(wanted) == len(got) and all(map(torch.equal, wanted, got))


def _run(model: nn.Module, run: Run) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(model)
