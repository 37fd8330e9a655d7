"""A retrofitted network takes a batch of no images wherever the original does: a detector's head on no proposals.

Compiled and exported networks: tests/attention/test_citizens.py.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from networks import randomise_se, randomised, se_modules
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from se_retrofit import add_se, fold_se, fuse_se, to_native
from se_retrofit.attention import GATES


class LastUnit(nn.Module):
    """Channels last, with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) + self.norm(self.conv(x).permute(0, 2, 3, 1))


class Detector(nn.Module):
    """Features of the image, and what the head says of the proposals in it, as in Mask R-CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, stride=2)
        self.head = nn.Sequential(nn.Conv2d(4, 8, 1), BasicBlock(8, 8), LastUnit(), nn.Flatten(), nn.Linear(8 * 25, 3))

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        return self.head(torchvision.ops.roi_align(self.backbone(image), [boxes], 5))


BOXES = torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 2.0, 20.0, 12.0]])


@pytest.mark.parametrize("gate", GATES)
def test_a_detectors_head_goes_on_without_proposals_also_fused_folded_and_in_native_form(gate: str) -> None:
    inputs = torch.randn(1, 3, 32, 32), BOXES
    model = randomise_se(add_se(randomised(Detector()).eval(), gate=gate, example_inputs=inputs))
    assert [se.channel_dim for se in se_modules(model).values()] == [-3, -1]
    folded = copy.deepcopy(model)
    folded.head = fold_se(model.head, [torch.randn(2, 4, 5, 5)], tolerance=1e9)
    forms = [model, fuse_se(model), folded, *([to_native(model)] if gate == "sigmoid" else [])]
    for form, training, grad in itertools.product(forms, (False, True), (False, True)):
        with torch.set_grad_enabled(grad):
            assert form.train(training)(inputs[0], BOXES[:0]).shape == (0, 3)
            assert form(*inputs).isfinite().all()
