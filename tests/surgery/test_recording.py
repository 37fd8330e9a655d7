"""Short ways that the surgery takes give what the long ways give."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from structure import Unit, conv
from torch import Tensor, nn

from se_retrofit import RetrofitError, plan_se
from se_retrofit.surgery.record.copying import copied, on_meta
from se_retrofit.surgery.record.meta import MetaOperations

aten = torch.ops.aten
X = torch.empty(2, 4, 6, 6, device="meta")
LAST = X.to(memory_format=torch.channels_last)
WEIGHT = torch.empty(8, 4, 3, 3, device="meta")
CONVOLUTION = (WEIGHT, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
OPERATIONS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.add.Tensor, (X, X)),
    (aten.add.Tensor, (X, LAST)),
    (aten.add.Tensor, (LAST, LAST)),
    (aten.add.Tensor, (X, torch.empty(4, 1, 1, device="meta", dtype=torch.float64))),
    (aten.add.Tensor, (X.long(), 1)),
    (aten.add.Tensor, (X.long(), 1.0)),
    (aten.add.Tensor, (X.bool(), True)),
    (aten.add.Tensor, (X.bool(), 1)),
    (aten.mean.dim, (X, [2, 3])),
    (aten.mean.dim, (X, [2, 3], True)),
    (aten.convolution.default, (X, *CONVOLUTION)),
    (aten.convolution.default, (LAST, *CONVOLUTION)),
    (aten.max_pool2d_with_indices.default, (X, [2, 2], [2, 2])),
    (aten.split.Tensor, (X, 2, 1)),
]


def forms(output: Any) -> list[tuple[Any, ...]]:
    tensors = [output] if isinstance(output, Tensor) else list(output)
    return [(type(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def test_an_operation_asked_for_again_has_outputs_of_the_same_form() -> None:
    known = MetaOperations()
    for turn in range(3):
        for operation, args in OPERATIONS:
            got, wanted = known.run(operation, args, {}), operation(*args)
            assert forms(got) == forms(wanted), (turn, operation)
            assert type(got) is type(wanted)
        x, viewed = torch.empty_like(X), torch.empty_like(X)
        assert known.run(aten.relu_.default, (x,), {}) is x
        assert known.run(aten.transpose_.default, (viewed, 0, 1), {}) is viewed
        assert viewed.shape == (4, 2, 6, 6)
        with pytest.raises((NotImplementedError, RuntimeError)):  # it depends on values
            known.run(aten._local_scalar_dense.default, (torch.empty((), device="meta"),), {})


class Twins(nn.Module):
    """Modules, parameters and containers that stand in several places; attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.second, self.third = nn.Conv2d(3, 3, 3), self.first
        self.second.weight = self.first.weight
        self.lists = [self.first, {"a": self.norm, "b": torch.ones(2)}]
        self.same = self.lists
        self.empty: set[int] = set()
        self.empty_again = self.empty
        self.register_buffer("kept", torch.arange(3), persistent=False)
        self.second._forward_hooks = self.first._forward_hooks  # shared, and empty
        self.upsample = nn.Upsample(scale_factor=2)


def test_a_copy_is_that_of_deepcopy() -> None:
    model = Twins()
    wanted = copy.deepcopy(model)
    for convert in (None, on_meta):
        got: Any = copied(model, convert, independent=convert is not None)
        assert [(n, type(m), sorted(vars(m))) for n, m in got.named_modules()] == [
            (n, type(m), sorted(vars(m))) for n, m in wanted.named_modules()
        ]
        assert not {id(m) for m in model.modules()} & {id(m) for m in got.modules()}
        assert got.third is got.first is got.lists[0]
        assert got.second.weight is got.first.weight is not model.first.weight
        assert got.same is got.lists is not model.lists
        assert got.lists[1]["a"] is got.norm
        assert got.empty_again is got.empty is not model.empty
        assert got.second._forward_hooks is got.first._forward_hooks is not model.first._forward_hooks
        assert [n for n, _ in got.named_buffers()] == [n for n, _ in wanted.named_buffers()]
        ours, theirs = got.state_dict(keep_vars=True), wanted.state_dict(keep_vars=True)
        assert [(n, t.shape, t.dtype, type(t)) for n, t in ours.items()] == [
            (n, t.shape, t.dtype, type(t)) for n, t in theirs.items()
        ]


class Told(nn.Conv2d):
    """Copies and pickles by a state of its own."""

    told = 0

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.told += 1


def test_a_module_that_copies_in_its_own_way_is_asked() -> None:
    assert copied(nn.Sequential(Told(3, 3, 3)))[0].told == 1


@pytest.mark.parametrize("switch", [gc.enable, gc.disable], ids=["on", "off"])
@pytest.mark.parametrize("model", [nn.Sequential(conv(3, 8), Unit()), nn.Linear(2, 2)], ids=["planned", "refused"])
def test_the_garbage_collector_is_left_on_or_off(switch: Callable[[], None], model: nn.Module) -> None:
    try:
        switch()
        before = gc.isenabled()
        with contextlib.suppress(RetrofitError):
            plan_se(model)
        assert gc.isenabled() == before
    finally:
        gc.enable()
