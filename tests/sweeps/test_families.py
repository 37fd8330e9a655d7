"""The smallest network of each family: converted as docs/zoo.csv lists it, it computes the same and trains, and torch.fx and
TorchScript take it where they take the original."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numeric import check_promises, tensors
from torch import nn
from zoo_rows import OUT_OF_DATE, never_refused, smallest_of_each_family

from se_retrofit.retrofit import plan_of
from tools.zoo import Row, entries

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.filterwarnings("ignore"),  # the libraries warn a great deal while they build networks
]


def task(row: Row) -> tuple[str, str]:
    """A library's family of classifiers; of its networks for other tasks, whose families share most of their code, the task."""
    return row.name.partition("/")[0], row.family.partition(".")[0]


# tracing and scripting take longer than all else
TRACED = {task(row): row.name for row in smallest_of_each_family()}.values()


@pytest.mark.parametrize("listed", smallest_of_each_family(), ids=lambda row: row.name)
def test_computes_the_same_trains_and_is_traced_and_has_the_blocks_that_are_listed(listed: Row) -> None:
    (entry,) = entries([listed.name])
    torch.manual_seed(0)
    model = entry.build(device="cpu")
    if listed.family.startswith("detection"):
        retrofitted = _check_detector(model)
    else:
        inputs = _small_inputs(model, listed.family)
        retrofitted = check_promises(model, lambda net: net(*[x.clone() for x in inputs]))
    plan = plan_of(retrofitted)
    assert (Counter(site.kind for site in plan.sites), plan.parameters) == (listed.kinds, listed.extra), OUT_OF_DATE
    for take in (torch.fx.symbolic_trace, torch.jit.script) if listed.name in TRACED else ():
        error = _refusal(take, retrofitted)
        if error is not None and (never_refused(listed) or _refusal(take, model) is None):
            raise AssertionError(f"{take.__name__} takes the original, and not the retrofitted network") from error


def _refusal(take: Callable[[nn.Module], object], model: nn.Module) -> Exception | None:
    """Why a tracer does not take a network; None if it does."""
    try:
        take(copy.deepcopy(model).eval())  # it may leave proxies in attributes, and more
    except Exception as error:
        return error
    return None


def _small_inputs(model: nn.Module, family: str) -> tuple[torch.Tensor, ...]:
    """The smallest inputs on which the network runs in both modes; its constructor may have fixed their size."""
    normed = any("BatchNorm" in type(module).__name__ for module in model.modules())
    for shape in _shapes(model, family):
        # two images are needed by batch norms alone
        x = torch.randn(1 + normed, *shape, generator=torch.Generator().manual_seed(1))
        inputs = (x, x.flip(-1)) if family.startswith("optical_flow") else (x,)
        try:
            with torch.no_grad():
                for mode in (False, True):
                    output = copy.deepcopy(model).train(mode)(*inputs)
                    assert all(t.isfinite().all() for t in tensors(output))
        except Exception:  # too small, or not the fixed size
            continue
        return inputs
    raise AssertionError("it runs on no size that was tried")


def _shapes(model: nn.Module, family: str) -> Iterator[tuple[int, ...]]:
    if family.startswith("video"):
        yield from [(3, 8, 32, 32), (3, 16, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224)]
        return
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size", (3, 224, 224))
    for side in (64, 96, 128, 160, 192, 224, 256, 299):
        yield channels, side, side
    yield channels, *size


def _check_detector(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 96, 128, generator=generator), torch.rand(3, 96, 112, generator=generator)]
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 80.0]]),
        "labels": torch.tensor([1, 2]),
        "masks": (torch.rand(2, 96, 112, generator=generator) > 0.5).to(torch.uint8),
        "keypoints": torch.tensor([20.0, 30.0, 1.0]).expand(2, 17, 3).clone(),
    }
    if "keypoint" in type(model).__name__.lower():
        target["labels"] = torch.tensor([1, 1])

    def train_run(net: nn.Module) -> Any:
        targets = [{**target, "masks": torch.ones(2, *image.shape[-2:], dtype=torch.uint8)} for image in images]
        return net(images, [{k: v.clone() for k, v in t.items()} for t in targets])

    return check_promises(model, lambda net: net(images), train_run)
