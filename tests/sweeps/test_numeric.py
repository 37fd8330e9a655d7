"""Real numbers through the smallest network of each family.

Which ones these are is read from docs/zoo.csv, the result of the last walk over all names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numeric import check_promises, tensors
from torch import nn
from zoo_rows import smallest_of_each_family

from tools.zoo import entries

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.filterwarnings("ignore"),  # the libraries warn a great deal while they build networks
]


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_computes_the_same_and_trains(name: str) -> None:
    (entry,) = entries([name])
    torch.manual_seed(0)
    model = entry.build(device="cpu")
    if entry.family.startswith("detection"):
        _check_detector(model)
        return
    inputs = _small_inputs(model, entry.family)
    check_promises(model, lambda net: net(*[x.clone() for x in inputs]), example_inputs=inputs)


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


def _check_detector(model: nn.Module) -> None:
    transform: Any = model.transform
    if transform.fixed_size is None:
        transform.min_size, transform.max_size = (96,), 128
    _fewer_proposals(model)
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

    check_promises(model, lambda net: net(images), train_run)


def _fewer_proposals(model: Any) -> None:
    """The heads run on each of a thousand proposals otherwise, which takes minutes and shows no more."""
    if hasattr(model, "rpn"):
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 20, "testing": 10}
        model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        model.roi_heads.detections_per_img = 3
