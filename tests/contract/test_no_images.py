"""A retrofitted network takes a batch of no images wherever the original does: a detector's head on no proposals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from networks import randomise_se, randomised, se_modules
from sweeps import swept
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from se_retrofit import add_se, fold_se, fuse_se, to_native
from se_retrofit.attention import GATES
from se_retrofit.exporting import export

pytestmark = pytest.mark.xdist_group("compilers")


class LastUnit(nn.Module):
    """Channels last, with a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) + self.norm(self.conv(x).permute(0, 2, 3, 1))


def head() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(nn.Conv2d(4, 8, 1), BasicBlock(8, 8), LastUnit(), nn.Flatten(), nn.Linear(8 * 25, 3))
    ).eval()


class Detector(nn.Module):
    """Features of the image, and what the head says of the proposals in it, as in Mask R-CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3, stride=2), head()

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        return self.head(torchvision.ops.roi_align(self.backbone(image), [boxes], 5))


EXAMPLE = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
NONE = EXAMPLE[:0]


def retrofitted(gate: str) -> nn.Module:
    model = add_se(head(), gate=gate, example_inputs=EXAMPLE)
    assert [se.channel_dim for se in se_modules(model).values()] == [-3, -1]
    return randomise_se(model)


def check(model: Any) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert model(NONE).shape == (0, 3)


@pytest.mark.parametrize("gate", GATES)
def test_a_detectors_head_goes_on_without_proposals(gate: str) -> None:
    image, boxes = torch.randn(1, 3, 32, 32), torch.tensor([[0.0, 0.0, 9.0, 9.0], [3.0, 2.0, 20.0, 12.0]])
    model = add_se(Detector(), gate=gate, example_inputs=(image, boxes)).eval()
    assert list(se_modules(model)) == ["head.1.se_attention", "head.2.se_attention"]
    for training in (False, True):
        model.train(training)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert model(image, boxes[:0]).shape == (0, 3)
                assert model(image, boxes).isfinite().all()


@pytest.mark.parametrize("gate", GATES)
def test_fused_and_folded_and_in_native_form(gate: str) -> None:
    model = retrofitted(gate)
    check(fuse_se(model))
    check(fold_se(retrofitted(gate), [EXAMPLE], tolerance=1e9))
    if gate == "sigmoid":
        check(to_native(model))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("gate", swept(["identity"], ["sigmoid"]))
def test_compiled_and_exported_with_a_dynamic_batch(gate: str) -> None:
    model = retrofitted(gate)
    check(torch.compile(model, backend="eager", fullgraph=True))
    batch = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(model, (EXAMPLE,), dynamic_shapes=({0: batch},))
    check(program.module())


@pytest.mark.parametrize("gate", swept(["identity"], ["sigmoid"]))
def test_in_a_file_of_onnx(gate: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = onnxruntime.InferenceSession(export(retrofitted(gate), tmp_path / "head.onnx"))
    name = session.get_inputs()[0].name
    for images in (NONE, EXAMPLE):
        assert session.run(None, {name: images.numpy()})[0].shape == (len(images), 3)
