"""Int8 costs a network with SE no more than one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise_se, randomised
from timm.models.resnet import BasicBlock
from torch import nn

from se_retrofit import add_se, export

pytest.importorskip("onnx")

# in one process, as PyTorch's compilers and exporters take seconds to import
pytestmark = pytest.mark.xdist_group("compilers")

IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    blocks = BasicBlock(16, 16), BasicBlock(16, 16)
    layers = nn.Conv2d(3, 16, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return randomised(nn.Sequential(*layers)).eval()


def with_se() -> nn.Module:
    return randomise_se(add_se(network(), example_inputs=IMAGES[:2]))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # onnxruntime's own
def test_int8_changes_a_network_with_se_hardly_more_than_a_plain_one(tmp_path: Path) -> None:
    plain, retrofitted = change_by_int8(network(), tmp_path), change_by_int8(with_se(), tmp_path)
    assert 0 < retrofitted < 2 * plain < 0.2


def change_by_int8(model: nn.Module, folder: Path) -> float:
    """How much static quantisation by onnxruntime changes the outputs, relative to their norm."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    file = export(model, folder / "float.onnx", example_inputs=IMAGES[:2])
    name = onnxruntime.InferenceSession(file).get_inputs()[0].name

    class Calibration(CalibrationDataReader):
        left = iter([{name: images.numpy()} for images in IMAGES.split(16)])

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(file, folder / "int8.onnx", Calibration(), quant_format=QuantFormat.QDQ, per_channel=True)
    (found,) = onnxruntime.InferenceSession(folder / "int8.onnx").run(None, {name: IMAGES.numpy()})
    wanted = model(IMAGES).detach()
    return float((torch.from_numpy(found) - wanted).norm() / wanted.norm())
